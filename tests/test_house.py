"""The house rules as tests: layout, import order, doors, errors, and what the README promises."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from inspector import errors
from inspector.cli import cli
from tests.readme import ORDER, README, ROOT, module_path, with_generated_parts
from tests.samples import needs_models

PACKAGE = ROOT / "inspector"
SOURCES = sorted(
    [*PACKAGE.rglob("*.py"), *(ROOT / "pages").glob("*.py"), *ROOT.glob("*.py")],
    key=lambda path: path.as_posix(),
)
TOP_LEVEL = {
    *("app.py", "pyproject.toml", "inspector", "pages", "tests", "sample_models"),
    *("README.md", "LICENSE", "CHANGELOG.md", "Containerfile"),
}
# Who may import what; names are modules of inspector/, "web", "pages" and "app".
DOORS = {
    "onnxruntime": {
        *("runtime", "timing", "twin", "observers", "calibration", "prepare"),
        *("indexed_model", "quantizer", "quantize"),
    },
    "onnx": {
        *("model", "model_checks", "model_files", "folding", "runtime", "arrays", "twin"),
        *("equalize", "isolation", "skeleton"),
        *("observers", "calibration", "prepare", "indexed_model", "quantizer", "switchboard"),
        *("stages", "quantize"),
        *("float_constants", "sites", "freed_graph", "rewrite", "freed_file"),
    },
    "onnx_ir": {"model", "quantize"},
    "plotly": {"figures"},
    "streamlit": {"web", "pages", "app"},
    "rich": {"cli"},
    "click": {"cli"},
}


def place(path: Path) -> str:
    """The module of inspector/ a file belongs to, "pages" or "app"."""
    parts = path.relative_to(ROOT).parts
    return parts[1].removesuffix(".py") if parts[0] == "inspector" else parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all modules a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """The modules of inspector/ a file imports, "web" as one."""
    found = (name.split(".") for name in imported(path) if name.startswith("inspector."))
    return {parts[1] for parts in found if parts[1] in ORDER}


def test_the_order_lists_every_module_of_the_package() -> None:
    there = {place(path) for path in PACKAGE.glob("*.py")} | {"web"}
    assert there - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_modules_above_it(name: str) -> None:
    files = sorted(PACKAGE.joinpath(name).glob("*.py")) or [module_path(name)]
    above = {*ORDER[: ORDER.index(name)], *(["web"] if name == "web" else [])}
    for path in files:
        assert own_imports(path) <= above, f"{path.name} imports from below"


@pytest.mark.parametrize("library", DOORS)
def test_a_library_is_imported_behind_its_door_only(library: str) -> None:
    users = {
        place(path) for path in SOURCES if library in {n.split(".")[0] for n in imported(path)}
    }
    assert users <= DOORS[library]


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("inspector", "streamlit plotly onnx onnxruntime numpy"),
        ("inspector.cli", "streamlit plotly onnx onnxruntime numpy"),
        ("inspector.workbench", "streamlit plotly"),
        ("inspector.store", "streamlit plotly onnx onnxruntime"),
        ("inspector.jobs", "streamlit plotly onnx onnxruntime"),
    ],
)
def test_importing_stays_light(module: str, banned: str) -> None:
    code = f"import sys, {module}; print(*({{*{banned.split()!r}}} & {{*sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_the_top_level_is_fixed() -> None:
    ignored = {"__pycache__", "build", "dist"}
    there = {
        entry.name
        for entry in ROOT.iterdir()
        if not entry.name.startswith(".") and not entry.name.endswith(".egg-info")
    }
    assert there - ignored <= TOP_LEVEL


def test_every_source_file_has_a_head_that_says_what_it_is() -> None:
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_nothing_is_caught_broadly() -> None:
    # Where anything at all may come from outside (a job, ONNX Runtime's pre-processing, ONNX's
    # reference evaluator), the line says why. Elsewhere a broad clause may only clean up and raise
    # again.
    # (The web's tasks are what jobs call.)
    borders = {"jobs", "prepare", "folding", "web"}
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {n.id for n in caught if isinstance(n, ast.Name)}
            if node.type is not None and not names & {"Exception", "BaseException"}:
                continue
            last = node.body[-1]
            raises_again = isinstance(last, ast.Raise) and last.exc is None
            explained = "  # " in text.splitlines()[node.lineno - 1]
            assert raises_again or (place(path) in borders and explained), (
                f"{path.name}:{node.lineno} catches everything"
            )


def test_errors_are_one_tree_and_their_hint_is_required() -> None:
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.InspectorError):
            with pytest.raises(TypeError, match="hint"):
                kind("a message")  # type: ignore[call-arg]
            assert name in (errors.__doc__ or "") or kind is errors.InspectorError


def test_no_file_holds_a_path_of_somebodys_machine() -> None:
    machine = re.compile(r"(?<![\w.~*])/(?:work|root|home/\w+|Users/\w+)/")
    kinds = {".py", ".md", ".toml", ".json", ".css", ".js", ".yml"}
    folders = [ROOT / name for name in ("inspector", "pages", "tests", "sample_models", ".ci")]
    files = [*ROOT.glob("*.*"), *(f for d in folders if d.is_dir() for f in d.rglob("*"))]
    for path in files:
        if path.is_file() and path.suffix in kinds and path != Path(__file__):
            found = machine.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path.relative_to(ROOT)}: {found and found.group()}"


# ------------------------------------------------------------------------------------ README


def test_the_readme_opens_with_the_two_commands() -> None:
    blocks = README.read_text(encoding="utf-8").split("```")
    assert blocks[1].split("\n")[1:3] == [
        "pip install -e . && streamlit run app.py",
        'pip install -e ".[test]" && pytest',
    ]


def test_the_generated_parts_of_the_readme_are_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_generated_parts(text) == text, "run `python -m tests.readme`"


@pytest.mark.parametrize("name", cli.commands)
def test_the_readme_shows_every_option(name: str) -> None:
    text = README.read_text(encoding="utf-8")
    section = text.split(f"### `quant-inspector {name}")[1].split("\n#")[0]
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{parameter.name} has no help"
            for spelling in (*parameter.opts, *parameter.secondary_opts):
                assert re.search(rf"(?<![\w-]){re.escape(spelling)}(?![\w-])", section), spelling


def test_the_readme_shows_every_error_with_its_meaning() -> None:
    text = README.read_text(encoding="utf-8")
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.InspectorError):
            assert f"`{name}`" in text
            if kind is not errors.InspectorError:
                assert re.search(rf"^\| `{name}` \| \S", text, re.MULTILINE)


def test_the_readme_links_to_what_is_there() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for target in ("sample_models/README.md", "sample_models/digit-detector"):
        assert target in text
        assert (ROOT / target).exists()


def test_the_python_examples_of_the_readme_run(tmp_path: Path) -> None:
    blocks = README.read_text(encoding="utf-8").split("```python\n")[1:]
    example = "".join(block.split("```")[0] for block in blocks)
    # Caches go where the example is run; the sample is found by its path from there.
    tmp_path.joinpath("sample_models").symlink_to(ROOT / "sample_models")
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Output output0: 42.4 dB pooled, but the /head/Sigmoid_output_0")
    assert re.search(r"^/head/Concat_3 \d+\.\d+$", done.stdout, re.MULTILINE)


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@needs_models
def test_real_models_are_found_where_the_tests_look() -> None:
    assert os.environ.get("QUANT_INSPECTOR_MODELS") or (ROOT.parent / "shared" / "models").is_dir()
