"""The generated parts of the README: the map of `inspector/`, the command line, the settings.

`python -m tests.readme` rewrites them; `test_house` fails where the README differs.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click

from inspector.cli import cli
from inspector.hosting import SETTINGS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

# A module imports only modules above it. `web` is the Streamlit side.
ORDER = (
    *("errors", "publishing", "qparams", "metrics", "stats", "comparison", "groups"),
    *("error_scale", "pareto"),
    *("grid_schemes", "distribution", "lab", "range_choice"),
    *("model", "model_checks", "model_files", "folding", "scheme", "integer_operators"),
    *("content", "structure", "likeness", "alignment", "weights", "endpoints", "matching"),
    *("arrays", "images", "random_feeds", "texts", "feeds", "runtime", "equalize", "timing"),
    "costs",
    *("kernels", "devices", "padding", "watches", "detections"),
    *("output_metrics", "task_metrics", "nonfinite", "states", "batches", "pairs"),
    *("layouts", "twin", "isolation", "compare", "skeleton", "node_links"),
    *(
        "observers",
        "calibration",
        "recipe",
        "prepare",
        "indexed_model",
        "quantizer",
        "stages",
        "switchboard",
        "quantize",
    ),
    *("commands", "exclusions", "list_exports"),
    *("quantized_flow", "float_constants", "sites", "free_targets", "freed_graph"),
    *("freed_effects", "rewrite", "freed_file", "preview", "recipe_table"),
    *("trials", "sensitivity", "noise_model", "search_result", "search", "real_files", "cluster"),
    *("findings", "weight_rules", "activation_rules", "diagnosis"),
    *("figures", "render", "node_figures", "store", "details", "workbench", "live"),
    *("logs", "confinement", "jobs"),
    *("guard", "hosting", "index", "audit", "housekeeping", "backup", "cli", "web"),
)


def module_path(name: str) -> Path:
    package = ROOT / "inspector" / name
    return package / "__init__.py" if package.is_dir() else package.with_suffix(".py")


def purpose(name: str) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(module_path(name).read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`").rstrip(".")


def map_table() -> str:
    rows = [f"| `{name}` | {purpose(name)} |" for name in ORDER]
    return "\n".join(["| `inspector/` | what it is |", "|---|---|", *rows])


def settings_table() -> str:
    rows = [f"| `{name}` | {text} | {default} |" for name, text, default in SETTINGS]
    return "\n".join(["| variable | what it is | default |", "|---|---|---|", *rows])


def _option_cell(option: click.Option) -> str:
    names = [*option.opts, *option.secondary_opts]
    metavar = option.metavar
    if metavar is None and not option.is_flag:
        choices = getattr(option.type, "choices", None)
        metavar = "|".join(choices) if choices else option.type.name.split()[0].upper()
    text = ", ".join(names) + (f" {metavar}" if metavar else "")
    return f"`{text}`".replace("|", "\\|")


def _meaning_cell(option: click.Option) -> str:
    text = (option.help or "").replace("|", "\\|")
    if option.show_default and option.default is not None:
        text = f"{text.rstrip('.')}; default {option.default}."
    return f"{text} Required." if option.required else text


def command_text(name: str, command: click.Command) -> str:
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option)]
    words = " ".join((a.metavar or (a.name or "")).upper() for a in arguments)
    rows = [f"| {_option_cell(o)} | {_meaning_cell(o)} |" for o in options]
    return "\n".join(
        [
            f"### `quant-inspector {name} {words}`",
            "",
            (command.help or "").strip(),
            "",
            "| option | what it does |",
            "|---|---|",
            *rows,
        ]
    )


def cli_text() -> str:
    return "\n\n".join(command_text(name, cli.commands[name]) for name in cli.commands)


def with_generated_parts(readme: str) -> str:
    """The README's text with its generated parts renewed.

    Raises:
        ValueError: a pair of markers is missing.
    """
    parts = (("map", map_table()), ("cli", cli_text()), ("settings", settings_table()))
    for key, text in parts:
        begin, end = f"<!-- {key}:begin -->\n", f"\n<!-- {key}:end -->"
        if readme.count(begin) != 1 or readme.count(end) != 1:
            raise ValueError(f"README.md needs one pair of markers {begin.strip()} {end.strip()}")
        pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
        readme = pattern.sub(lambda _, b=begin, t=text, e=end: f"{b}\n{t}\n{e}", readme)  # type: ignore[misc]
    return readme


if __name__ == "__main__":
    README.write_text(with_generated_parts(README.read_text(encoding="utf-8")), encoding="utf-8")
