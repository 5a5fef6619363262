"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

from inspector.cli import _gate, _split_pair, main
from inspector.compare import compare_models
from inspector.feeds import load_feeds
from inspector.model_files import load_model
from inspector.render import comparison_json, strict
from tests.samples import (
    MODELS,
    ROOT,
    array,
    boxes_and_scores_in_one_concat,
    conv_relu_gemm,
    floats,
    model,
    needs_models,
    npz_folder,
    save,
)
from tests.test_render import make_output

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with float.onnx, int8.onnx (made by the command line) and inputs/."""
    folder = tmp_path_factory.mktemp("pair")
    save(conv_relu_gemm(), folder / "float.onnx")
    npz_folder(folder / "inputs", [{"x": floats((1, 3, 8, 8), seed)} for seed in range(10)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANT_INSPECTOR_DATA", str(folder / "data"))
        words = ["quantize", "float.onnx", "-o", "int8.onnx", "--inputs", "inputs"]
        patch.chdir(folder)
        assert main(words) == 0
    return folder


@pytest.fixture
def run(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs a command line in the pair's folder: exit code, stdout, stderr."""
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(pair / "data"))
    monkeypatch.chdir(pair)

    def call(*words: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def call_process(*words: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "inspector.cli", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen(command, env=env, **options)


def assert_user_error(result: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2, one error line with these parts, one hint line, nothing else."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith(("warning:", "note:"))]
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    for part in parts:
        assert part in lines[0]


COMPARE = ("compare", "float.onnx", "int8.onnx", "--inputs", "inputs")


def one_matmul() -> onnx.ModelProto:
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")
    return model([node], [("x", [2, 8])], [("y", [2, 4])], [array("w", floats((8, 4)))])


# ------------------------------------------------------------------------------- the program


def test_help_loads_no_engine_and_answers_at_once() -> None:
    code = (
        "import sys, inspector.cli; inspector.cli.main(['--help']);"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'rich', 'streamlit', 'plotly'} & {*sys.modules};"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in ("show", "compare", "quantize"):
        assert f"\n  {command}" in done.stdout
    assert time.perf_counter() - begin < 2  # 0.1 s on an idle machine


def test_version_names_the_engine(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"quant-inspector .+ \(onnxruntime [\d.]+, onnx [\d.]+\)\n", out)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["compre"], "No such command 'compre'"),
        (["compare"], "Missing argument 'FLOAT'"),
        ([*COMPARE, "--tp", "3"], "No such option"),
        ([*COMPARE, "--top", "-1"], "Invalid value for '--top'"),
        ([*COMPARE, "--samples", "0"], "Invalid value for '--samples'"),
        ([*COMPARE, "--simulated"], "--simulated says what --fail-under judges"),
        ([*COMPARE, "--fail-under", "nan"], "--fail-under takes a number"),
        ([*COMPARE, "--json", "-", "--csv", "-"], "only one of --json and --csv"),
        ([*COMPARE, "--random", "2"], "exclude each other"),
        (COMPARE[:3], "give --inputs PATH, or --random N"),
        ([*COMPARE[:3], "--random", "2", "--samples", "1"], "--samples goes with --inputs"),
        (["quantize", "float.onnx"], "Missing option '-o'"),
        (["quantize", "float.onnx", "-o", "o.onnx"], "--format qdq needs feeds"),
        (["quantize", "float.onnx", "-o", "o.onnx", "--percentile", "99"], "--method percentile"),
    ],
)
def test_a_wrong_command_line_is_a_user_error(run: Run, words: Sequence[str], part: str) -> None:
    assert_user_error(run(*words), part)
    assert not Path("o.onnx").exists()


def test_a_reader_that_goes_away_is_no_error(pair: Path) -> None:
    process = call_process(
        "show", str(pair / "int8.onnx"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_interrupting_ends_with_130_and_no_traceback(pair: Path, tmp_path: Path) -> None:
    # The command waits for a recipe that never comes.
    pipe = tmp_path / "recipe.json"
    os.mkfifo(pipe)
    path, out = str(pair / "float.onnx"), str(tmp_path / "o.onnx")
    process = call_process(
        "quantize", path, "-o", out, "--recipe", str(pipe), stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    # Until it reads: a signal between the opening and the reading is seen only after the reading.
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 130
    assert err.decode().strip() == "error: stopped"


# A command that says which process it is and then ends it, or waits.
ODD_COMMAND = """
import os, signal, sys, time
from inspector.cli import cli, main

@cli.command()
def odd():
    print(os.getpid(), flush=True)
    how = {how}
    os.kill(os.getpid(), how) if how else time.sleep(60)

sys.exit(main())
"""


def odd_process(how: int = 0) -> subprocess.Popen[str]:
    code = [sys.executable, "-c", ODD_COMMAND.format(how=int(how)), "odd"]
    return subprocess.Popen(
        code, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process of its own")
@pytest.mark.parametrize("how", [signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL])
def test_a_library_that_ends_the_process_leaves_two_lines(how: signal.Signals) -> None:
    with odd_process(how) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out.strip().isdigit()
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: quant-inspector odd: ")
    assert how.name in lines[0]
    assert lines[1].startswith("hint: ")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_what_ends_the_command_from_outside_ends_all_of_it(how: signal.Signals) -> None:
    with odd_process() as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert child != process.pid
        process.send_signal(how)
        # The pipes close when both have ended.
        _, err = process.communicate(timeout=30)
    assert process.returncode in (-how, 128 + how)  # as the system and as shells say it
    assert err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_control_c_on_a_terminal_reaches_both_and_ends_with_130() -> None:
    import pty

    child, terminal = pty.fork()
    if not child:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", ODD_COMMAND.format(how=0), "odd"])
    drawn = b""
    while b"\n" not in drawn:
        drawn += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):  # the other side has closed
        while chunk := os.read(terminal, 4096):
            drawn += chunk
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert drawn.count(b"error: stopped") == 1
    assert b"Traceback" not in drawn


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_is_drawn_on_a_terminal_only(pair: Path, run: Run) -> None:
    import pty

    words = ("compare", str(pair / "float.onnx"), str(pair / "int8.onnx"), "--random", "2")
    near, far = pty.openpty()
    process = call_process(*words, stdout=subprocess.DEVNULL, stderr=far, env={"TERM": "xterm"})
    os.close(far)
    drawn = b""
    while True:
        try:
            chunk = os.read(near, 4096)
        except OSError:  # the other side has closed
            break
        if not chunk:
            break
        drawn += chunk
    os.close(near)
    assert process.wait(60) == 0
    assert b"comparing" in drawn
    _, _, err = run(*words)
    assert "comparing" not in err
    assert "\x1b" not in err


# ------------------------------------------------------------------------------------- show


def test_show_describes_a_quantized_file(run: Run) -> None:
    code, out, _ = run("show", "int8.onnx")
    assert code == 0
    lines = dict(re.findall(r"^(\w[\w ]*?)  +(.+)$", out, re.MULTILINE))
    assert lines["file"] == "int8.onnx"
    assert lines["format"] == "qdq"
    assert lines["weights"] == "2 of 2 quantized"
    assert lines["inputs"] == "x: float32[1, 3, 8, 8]"
    assert lines["recipe"].startswith("format qdq, activation type int8, weight type int8")


def test_show_of_a_float_file_has_no_recipe(run: Run) -> None:
    code, out, _ = run("show", "float.onnx")
    assert code == 0
    assert "recipe" not in out
    assert "0 of 5 quantized" in out


def test_show_writes_strict_json(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("show", "int8.onnx", "--json", "-")
    assert code == 0
    data = json.loads(out)
    assert data["quant_format"] == "qdq"
    assert data["recipe"]["weight_type"] == "int8"
    code, text, _ = run("show", "int8.onnx", "--json", tmp_path / "show.json")
    assert json.loads((tmp_path / "show.json").read_text()) == data
    assert text.startswith("file ")


def test_files_that_are_no_models_are_user_errors(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.onnx"
    page.write_text("<!DOCTYPE html><html></html>")
    assert_user_error(run("show", page), "page.onnx is an HTML or XML page")
    assert_user_error(run("show", "nowhere.onnx"), "nowhere.onnx does not exist")
    assert_user_error(run("show", tmp_path), "is a folder, expected an ONNX file")


# ---------------------------------------------------------------------------------- compare


def test_compare_opens_with_the_finding_and_names_both_files(run: Run) -> None:
    code, out, _ = run(*COMPARE)
    assert code == 0
    assert re.match(r"Output y \d+\.\d dB: nothing stands out\n", out)
    for part in ("float.onnx", "int8.onnx", "10 samples", "Activations: worst", "Weights: worst"):
        assert part in out


def test_compare_names_the_slice_that_a_shared_scale_silenced(run: Run, tmp_path: Path) -> None:
    save(boxes_and_scores_in_one_concat(), tmp_path / "m.onnx")
    feeds = npz_folder(tmp_path / "in", [{"x": floats((1, 3, 6, 6), seed)} for seed in range(4)])
    path, out = tmp_path / "m.onnx", tmp_path / "q.onnx"
    assert run("quantize", path, "-o", out, "--inputs", feeds)[0] == 0
    code, text, _ = run("compare", path, out, "--inputs", feeds)
    assert code == 0
    first = text.splitlines()[0]
    assert re.fullmatch(
        r"Output y: \d\d\.\d dB pooled, but the scores slice (is silent|is noise|has only) ?.*"
        r": 3 of 7 channels carry no signal",
        first,
    ), first
    assert "Slices far below the whole" in text


def test_compare_writes_the_numbers_of_the_library(run: Run, pair: Path, tmp_path: Path) -> None:
    code, _, _ = run(*COMPARE, "--json", tmp_path / "c.json", "--csv", tmp_path / "c.csv")
    assert code == 0
    data = json.loads((tmp_path / "c.json").read_text())
    reference = load_model(pair / "float.onnx")
    expected = comparison_json(
        compare_models(
            reference,
            load_model(pair / "int8.onnx"),
            load_feeds(pair / "inputs", reference),
            measure_latency=False,
        )
    )
    for key in ("weights", "activations", "outputs", "unmatched", "samples", "headline"):
        assert data[key] == expected[key]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "c.csv").read_bytes().decode())))
    (output,) = (row for row in rows if row["kind"] == "output")
    assert float(output["sqnr_db"]) == expected["outputs"][0]["sqnr_db"]


def test_json_on_stdout_stands_alone(run: Run) -> None:
    code, out, _ = run(*COMPARE, "--json", "-")
    assert code == 0
    assert json.loads(out)["format"] == "quant-inspector/comparison"
    code, out, _ = run(*COMPARE, "--csv", "-")
    assert out.startswith("kind,name,node,")


def test_samples_limits_the_feeds(run: Run) -> None:
    _, out, _ = run(*COMPARE, "--samples", "3", "--json", "-")
    assert json.loads(out)["samples"] == 3


def test_random_feeds_are_marked_wherever_their_numbers_appear(run: Run) -> None:
    words = (*COMPARE[:3], "--random", "3", "--seed", "7")
    _, out, _ = run(*words)
    assert out.splitlines()[0].endswith("(random feeds)")
    assert "3 samples, random feeds, no data" in out
    _, out, _ = run(*words, "--json", "-")
    data = json.loads(out)
    assert data["random_feeds"] is True
    _, again, _ = run(*words, "--json", "-")
    assert json.loads(again)["outputs"] == data["outputs"]


def test_calibration_tells_seen_from_unseen(run: Run, tmp_path: Path) -> None:
    calibration = npz_folder(tmp_path, [{"x": floats((1, 3, 8, 8), 0)}])
    _, out, _ = run(*COMPARE, "--calibration", calibration, "--json", "-")
    data = json.loads(out)
    assert data["seen"] == "mixed"
    assert isinstance(data["outputs"][0]["seen_sqnr_db"], float)
    _, out, _ = run(*COMPARE, "--json", "-")
    assert json.loads(out)["seen"] == "unknown"


def test_warnings_go_to_stderr_and_into_the_json(run: Run, tmp_path: Path) -> None:
    unnamed = conv_relu_gemm()
    unnamed.graph.node[0].name = ""
    path = save(unnamed, tmp_path / "unnamed.onnx")
    code, out, err = run("compare", path, "int8.onnx", "--inputs", "inputs", "--json", "-")
    assert code == 0
    warnings = json.loads(out)["warnings"]
    assert any("1 of 5 nodes have no name" in warning for warning in warnings)
    assert err.splitlines() == [f"warning: {warning}" for warning in warnings]


def test_the_gate_passes_and_fails_by_exit_code(run: Run) -> None:
    assert run(*COMPARE, "--fail-under", "5")[0] == 0
    code, out, err = run(*COMPARE, "--fail-under", "300")
    assert code == 1
    assert out.startswith("Output y")
    assert re.search(r"gate failed: output y has .* dB deployed, wanted at least 300.0 dB", err), (
        err
    )
    code, _, err = run(*COMPARE, "--fail-under", "300", "--simulated")
    assert code == 1
    assert " simulated, wanted" in err


def test_the_gate_judges_deployed_outputs_unless_told_otherwise() -> None:
    output = make_output("y", 30.0, deployed_sqnr_db=10.0)
    assert len(_gate([output], 20.0, simulated=False)) == 1
    assert _gate([output], 20.0, simulated=True) == []
    assert _gate([output], 10.0, simulated=False) == []


def test_the_gate_fails_on_nan_and_on_nothing_to_judge() -> None:
    nan, inf = float("nan"), float("inf")
    assert len(_gate([make_output("y", nan)], -inf, simulated=False)) == 1
    assert _gate([make_output("y", inf)], 99.0, simulated=False) == []
    assert len(_gate([], 0.0, simulated=False)) == 1


# ----------------------------------------------------- names on the command line, "=" in them


def split(text: str, left: Sequence[str], right: Sequence[str]) -> tuple[str, str]:
    words = ("FLOAT=QUANTIZED", "tensor of the float model", "tensor of the quantized model")
    return _split_pair("--pin", text, words, left, right)


def test_a_pair_is_split_where_both_names_exist() -> None:
    assert split("a=b", ["a"], ["b"]) == ("a", "b")
    assert split("a=b=c", ["a", "a=b"], ["c", "b"]) == ("a=b", "c")
    assert split("a=b=c", ["a", "x"], ["b=c", "c"]) == ("a", "b=c")
    assert split("==", ["="], [""]) == ("=", "")


@pytest.mark.parametrize(
    ("text", "part", "hint"),
    [
        ("a", "--pin 'a' holds no '='", "Write --pin FLOAT=QUANTIZED."),
        ("a=b=c", "can be read in 2 ways: 'a' and 'b=c' or 'a=b' and 'c'", "compare_models"),
        ("aa=c", "--pin 'aa': there is no such tensor of the float model", "Nearest: a, a=b."),
        ("a=cc", "--pin 'cc': there is no such tensor of the quantized model", "Nearest: c, b=c."),
        ("a=b=d", "names no tensor of the float model and tensor of", "For a = … Nearest: "),
        ("x=b=c", "names no tensor of the float model and tensor of", "For … = b=c Nearest: "),
        ("x=y=z", "names no tensor of the float model and tensor of", "Write --pin FLOAT=QUANT"),
    ],
)
def test_a_pair_without_one_meaning_is_an_error_whose_hint_helps(
    text: str, part: str, hint: str
) -> None:
    with pytest.raises(click.UsageError) as caught:
        split(text, ["a", "a=b"], ["c", "b=c"])
    assert part in caught.value.message
    assert hint in caught.value.hint  # type: ignore[attr-defined]


def equals_in_names() -> onnx.ModelProto:
    """A step of a recurrent model whose names hold "="."""
    make = onnx.helper.make_node
    return model(
        [make("MatMul", ["x", "w=1"], ["m=1"], "mm"), make("Add", ["m=1", "h=0"], ["h=1"], "add")],
        [("x", [1, 4]), ("h=0", [1, 4])],
        [("h=1", [1, 4])],
        [array("w=1", floats((4, 4)))],
    )


@pytest.fixture
def recurrent(run: Run, tmp_path: Path) -> tuple[str, ...]:
    """A command that compares a dynamically quantized step with its float model."""
    path, quantized = save(equals_in_names(), tmp_path / "r.onnx"), tmp_path / "rq.onnx"
    quantize_dynamic(path, quantized, weight_type=QuantType.QInt8)
    feeds = [{"x": floats((1, 4), i), "h=0": np.zeros((1, 4), np.float32)} for i in range(3)]
    folder = npz_folder(tmp_path / "steps", feeds)
    return ("compare", str(path), str(quantized), "--inputs", str(folder))


@pytest.mark.parametrize(
    ("words", "part", "hint"),
    [
        (
            ["--mask", "y"],
            "no input 'y' that could mark padding, the nearest are ",
            "zeros mark padding",
        ),
        (["--state", "x=h=0"], "names no output of the float model", "For … = h=0 Nearest: h=1."),
        (["--state", "h=1"], "--state 'h': there is no such output of the float", "Nearest: h=1."),
        (
            ["--state", "h=1=h=0", "--state", "h=1=h=0"],
            "input h=0 is to get the state of several outputs",
            "Name each input once.",
        ),
        (["--pin", "x"], "--pin 'x' holds no '='", "Write --pin FLOAT=QUANTIZED."),
        (["--refuse", "z"], "--refuse 'z': there is no such tensor of the float", "Nearest: "),
        (
            ["--pin", "x=x", "--refuse", "x"],
            "--pin and --refuse say two things about 'x'",
            "Give 'x' one partner, or refuse it.",
        ),
        (
            ["--pin", "x=x", "--pin", "x=h=0"],
            "--pin say two things about 'x'",
            "Give 'x' one partner, or refuse it.",
        ),
    ],
)
def test_names_that_mean_nothing_are_user_errors_with_the_nearest(
    run: Run, recurrent: tuple[str, ...], words: Sequence[str], part: str, hint: str
) -> None:
    result = run(*recurrent, *words)
    assert_user_error(result, part)
    assert hint in result[2].splitlines()[-1]


def test_control_characters_in_names_and_paths_reach_no_terminal(run: Run, tmp_path: Path) -> None:
    nasty = "evil\x1b[2J\x9b\u202e\r\nhint: run this"
    assert_user_error(run("show", f"{nasty}.onnx"), r"evil\x1b[2J\x9b\u202e\r\nhint: run this")
    assert_user_error(run(*COMPARE, "--mask", nasty), "evil")
    proto = conv_relu_gemm()
    proto.graph.node[1].name = proto.producer_name = nasty
    for node in proto.graph.node:
        node.input[:] = [nasty if name == "r" else name for name in node.input]
        node.output[:] = [nasty if name == "r" else name for name in node.output]
    path = save(proto, tmp_path / "nasty.onnx")
    for words in (
        ("show", path),
        ("compare", path, "int8.onnx", "--inputs", "inputs", "--json", tmp_path / "c.json"),
        ("quantize", path, "-o", tmp_path / "q.onnx", "--inputs", "inputs", "--exclude", nasty),
        ("quantize", path, "-o", tmp_path / "q.onnx", "--inputs", "inputs", "--exclude", "pool"),
    ):
        code, out, err = run(*words)
        # Such a file may as well be refused, in words that command nothing.
        assert code in (0, 2)
        assert all(line.isprintable() for line in (*out.split("\n"), *err.split("\n")))
        assert "\nhint: run this" not in out + err


# ------------------------------------------------------------- what the new options change


def test_a_state_is_carried_from_sample_to_sample(run: Run, recurrent: tuple[str, ...]) -> None:
    # Every recorded state is zero: only what is carried makes the later samples differ.
    apart = json.loads(run(*recurrent, "--json", "-")[1])
    code, out, _ = run(*recurrent, "--state", "h=1=h=0", "--json", "-")
    assert code == 0
    carried = json.loads(out)
    assert (apart["states"], carried["states"]) == ([], [["h=1", "h=0"]])
    (alone,), (fed,) = apart["outputs"], carried["outputs"]
    assert fed["per_sample_sqnr_db"][0] == alone["per_sample_sqnr_db"][0]
    assert fed["per_sample_sqnr_db"][1:] != alone["per_sample_sqnr_db"][1:]
    _, text, _ = run(*recurrent, "--state", "h=1=h=0")
    assert "  states: each model hands its own from sample to sample: h=1 → h=0\n" in text


def test_a_pin_and_a_refusal_decide_what_is_compared(run: Run, recurrent: tuple[str, ...]) -> None:
    before = json.loads(run(*recurrent, "--json", "-")[1])
    assert "m=1" in {a["name"] for a in before["activations"]}
    code, out, _ = run(*recurrent, "--refuse", "m=1", "--pin", "h=1=h=1", "--json", "-")
    assert code == 0
    data = json.loads(out)
    assert data["pins"] == [
        {"float_name": "h=1", "quantized_name": "h=1"},
        {"float_name": "m=1", "quantized_name": None},
    ]
    rules = {a["name"]: a["matched_by"] for a in data["activations"]}
    assert rules["h=1"] == "pin"
    assert "m=1" not in rules
    assert "m=1" in {u["name"] for u in data["unmatched"]}


def test_a_provider_that_is_not_there_is_a_user_error(run: Run) -> None:
    assert_user_error(run(*COMPARE, "--provider", "NoExecutionProvider"), "NoExecutionProvider")
    _, out, _ = run(*COMPARE, "--provider", "CPUExecutionProvider", "--json", "-")
    assert json.loads(out)["provider"] == "CPUExecutionProvider"


def padded_rows() -> onnx.ModelProto:
    """A MatMul over positions; `mask` says which of them count."""
    make = onnx.helper.make_node
    return model(
        [
            make("MatMul", ["x", "w"], ["z"], "matmul"),
            make("Unsqueeze", ["mask", "last"], ["m"], "unsqueeze"),
            make("Add", ["z", "m"], ["y"], "add"),
        ],
        [("x", [1, "n", 8]), ("mask", [1, "n"])],
        [("y", [1, "n", 4])],
        [array("w", floats((8, 4))), array("last", np.array([2]))],
    )


def test_masked_positions_do_not_count(run: Run, tmp_path: Path) -> None:
    path, quantized = save(padded_rows(), tmp_path / "p.onnx"), tmp_path / "pq.onnx"
    quantize_dynamic(path, quantized, weight_type=QuantType.QInt8)
    feeds = []
    for seed, length in enumerate((5, 7, 6)):
        x, mask = floats((1, length, 8), seed), np.ones((1, length), np.float32)
        x[:, 3:], mask[:, 3:] = 1e3, 0.0
        feeds.append({"x": x, "mask": mask})
    folder = npz_folder(tmp_path / "in", feeds)
    words = ("compare", path, quantized, "--inputs", folder)
    whole = json.loads(run(*words, "--json", "-")[1])
    code, out, _ = run(*words, "--mask", "mask", "--json", "-")
    assert code == 0
    masked = json.loads(out)
    assert (whole["mask"], masked["mask"]) == ("", "mask")
    # The padding is loud and exact; what counts is drowned by its range.
    assert masked["outputs"][0]["sqnr_db"] < whole["outputs"][0]["sqnr_db"] - 10
    assert "  mask: positions where mask is 0 do not count\n" in run(*words, "--mask", "mask")[1]


def test_tensors_of_a_device_stand_beside_ours(run: Run, pair: Path, tmp_path: Path) -> None:
    session = onnxruntime.InferenceSession(pair / "int8.onnx")
    dump = []
    for seed in range(10):
        (y,) = session.run(["y"], {"x": floats((1, 3, 8, 8), seed)})
        dump.append({"y": -y})  # a device that turns the sign
    folder = npz_folder(tmp_path / "dump", dump)
    code, out, _ = run(*COMPARE, "--actual", folder, "--json", tmp_path / "c.json")
    assert code == 0
    (device,) = json.loads((tmp_path / "c.json").read_text())["device"]
    assert (device["name"], device["verdict"], device["samples"]) == ("y", "device", 10)
    # Twice the signal is noise: -6.02 dB.
    assert device["device_sqnr_db"] == pytest.approx(-20 * np.log10(2), abs=1e-3)
    assert " dB on the device, whose own arithmetic adds the most noise" in out.splitlines()[0]
    assert "Device: worst 1 of 1" in out
    assert_user_error(run(*COMPARE, "--actual", tmp_path / "none"), "none")


def test_swapped_and_equal_models_are_user_errors(run: Run) -> None:
    assert_user_error(run("compare", "int8.onnx", "float.onnx", "--inputs", "inputs"), "swapped")
    assert_user_error(run("compare", "float.onnx", "float.onnx", "--random", "1"), "same bytes")


def test_feeds_that_do_not_fit_are_user_errors(run: Run, tmp_path: Path) -> None:
    assert_user_error(run(*COMPARE[:3], "--inputs", tmp_path / "none"), "does not exist")
    (tmp_path / "empty").mkdir()
    assert_user_error(run(*COMPARE[:3], "--inputs", tmp_path / "empty"))
    wrong = npz_folder(tmp_path / "wrong", [{"image": floats((1, 3, 8, 8))}])
    assert_user_error(run(*COMPARE[:3], "--inputs", wrong), "00.npz")


def test_results_are_never_written_over_inputs(run: Run, pair: Path) -> None:
    before = {name: (pair / name).read_bytes() for name in ("float.onnx", "int8.onnx")}
    assert_user_error(run(*COMPARE, "--json", "int8.onnx"), "would be overwritten")
    assert_user_error(
        run("quantize", "float.onnx", "-o", "./float.onnx", "--inputs", "inputs"),
        "would be overwritten",
    )
    assert {name: (pair / name).read_bytes() for name in before} == before


def test_a_result_that_cannot_be_written_is_a_user_error(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "no" / "such" / "c.json"
    assert_user_error(run("show", "float.onnx", "--json", target), "cannot be written")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------- quantize

QUANTIZE = ("quantize", "float.onnx", "--inputs", "inputs", "-o")


def test_quantize_writes_a_model_and_compares_it(run: Run, tmp_path: Path) -> None:
    out_file = tmp_path / "q.onnx"
    code, out, _ = run(*QUANTIZE, out_file)
    assert code == 0
    assert out.startswith(f"wrote {out_file}\n")
    assert "Output y" in out
    # Ten feeds: five calibrate.
    assert "10 samples, partly seen in calibration" in out
    onnx.checker.check_model(onnx.load(out_file))


def test_quantize_says_which_figures_are_seen(run: Run, tmp_path: Path) -> None:
    _, out, _ = run(*QUANTIZE, tmp_path / "a.onnx", "--samples", "4", "--json", "-")
    assert json.loads(out)["seen"] == "seen"
    _, out, _ = run(*QUANTIZE, tmp_path / "b.onnx", "--calibration-samples", "2", "--json", "-")
    data = json.loads(out)
    assert data["seen"] == "mixed"
    (output,) = data["outputs"]
    assert output["seen_sqnr_db"] != output["unseen_sqnr_db"]


def test_dynamic_quantization_needs_no_feeds(run: Run, tmp_path: Path) -> None:
    path = save(one_matmul(), tmp_path / "m.onnx")
    code, out, _ = run("quantize", path, "-o", tmp_path / "d.onnx", "--format", "dynamic")
    assert code == 0
    assert out == f"wrote {tmp_path / 'd.onnx'}\n"
    code, out, _ = run("show", tmp_path / "d.onnx", "--json", "-")
    assert json.loads(out)["quant_format"] == "dynamic"
    words = ("quantize", path, "-o", tmp_path / "e.onnx", "--format", "dynamic", "--random", "2")
    _, out, _ = run(*words, "--json", "-")
    assert json.loads(out)["seen"] == "unseen"


def test_excluded_nodes_stay_float_and_the_effect_is_told(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(*QUANTIZE, tmp_path / "q.onnx", "--exclude", "gemm")
    assert code == 0
    assert re.search(r"^  gemm: ", out, re.MULTILINE)
    gemm = load_model(tmp_path / "q.onnx").node_by_name["gemm"]
    assert gemm.inputs[1] == "gw"


def test_a_pattern_is_expanded_and_shown(run: Run, tmp_path: Path) -> None:
    _, _, err = run(*QUANTIZE, tmp_path / "p.onnx", "--exclude", "g*mm")
    assert "g*mm stands for gemm" in err
    run(*QUANTIZE, tmp_path / "n.onnx", "--exclude", "gemm")
    assert (tmp_path / "p.onnx").read_bytes() == (tmp_path / "n.onnx").read_bytes()


@pytest.mark.parametrize(
    ("name", "part"),
    [("gem", "'gemm'"), ("", "empty"), ("z*", "z*"), ("none.json", "none.json")],
)
def test_an_exclusion_that_means_nothing_is_a_user_error(
    run: Run, tmp_path: Path, name: str, part: str
) -> None:
    assert_user_error(run(*QUANTIZE, tmp_path / "q.onnx", "--exclude", name), part)
    assert list(tmp_path.iterdir()) == []


def test_a_saved_list_reproduces_the_model(run: Run, tmp_path: Path) -> None:
    words = ("--exclude", "gemm", "--per-channel", "--activation-type", "uint8")
    listed = tmp_path / "list.json"
    code, _, _ = run(*QUANTIZE, tmp_path / "a.onnx", *words, "--save-exclusions", listed)
    assert code == 0
    data = json.loads(listed.read_text())
    assert data["format"] == "quant-inspector/exclusions"
    assert [(n["name"], n["op_type"], n["outputs"]) for n in data["nodes"]] == [
        ("gemm", "Gemm", ["y"])
    ]
    assert data["recipe"]["per_channel"] is True
    assert data["measured"]["samples"] == 10
    assert isinstance(data["measured"]["output_sqnr_db"]["after"], float)
    code, _, err = run(*QUANTIZE, tmp_path / "b.onnx", "--exclude", listed)
    assert code == 0
    assert f"note: the recipe is the one in {listed}" in err
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_reasons_in_a_list_are_kept(run: Run, tmp_path: Path) -> None:
    listed = tmp_path / "list.json"
    entry = {"name": "gemm", "reason": "too few steps", "output_sqnr_gain_db": 3.5}
    listed.write_text(
        json.dumps({"format": "quant-inspector/exclusions", "version": 1, "nodes": [entry]})
    )
    saved = tmp_path / "saved.json"
    code, _, err = run(
        *QUANTIZE, tmp_path / "q.onnx", "--exclude", listed, "--save-exclusions", saved
    )
    assert code == 0
    assert "does not say which model it was made for" in err
    (node,) = json.loads(saved.read_text())["nodes"]
    assert (node["reason"], node["output_sqnr_gain_db"]) == ("too few steps", 3.5)


def test_a_list_for_another_model_is_refused_unless_accepted(run: Run, tmp_path: Path) -> None:
    listed = tmp_path / "list.json"
    data = {
        "format": "quant-inspector/exclusions",
        "version": 1,
        "float_model": {"name": "other.onnx", "sha256": "00" * 32},
        "nodes": [{"name": "gemm"}],
    }
    listed.write_text(json.dumps(data))
    words = (*QUANTIZE, tmp_path / "q.onnx", "--exclude", listed)
    assert_user_error(run(*words), "other.onnx")
    assert run(*words, "--accept-other-model")[0] == 0


def test_lists_with_different_recipes_need_one_to_be_named(run: Run, tmp_path: Path) -> None:
    paths = []
    for dtype in ("int8", "uint8"):
        path = tmp_path / f"{dtype}.json"
        data = {
            "format": "quant-inspector/exclusions",
            "version": 1,
            "nodes": [{"name": "gemm"}],
            "recipe": {"activation_type": dtype},
        }
        path.write_text(json.dumps(data))
        paths += ["--exclude", path]
    assert_user_error(run(*QUANTIZE, tmp_path / "q.onnx", *paths), "different recipes")
    recipe = tmp_path / "int8.json"
    assert run(*QUANTIZE, tmp_path / "q.onnx", *paths, "--recipe", recipe)[0] == 0


def test_a_recipe_is_read_from_json_and_options_win(run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"activation_type": "uint8", "per_channel": True}))
    saved = tmp_path / "list.json"
    words = (*QUANTIZE, tmp_path / "q.onnx", "--recipe", recipe, "--no-per-channel")
    words += ("--op-types", "Conv, Relu", "--op-types", "Gemm", "--save-exclusions", saved)
    assert run(*words)[0] == 0
    used = json.loads(saved.read_text())["recipe"]
    assert used["activation_type"] == "uint8"
    assert used["per_channel"] is False
    assert used["op_types"] == ["Conv", "Relu", "Gemm"]


def test_the_recipe_of_a_quantized_model_makes_it_again(run: Run, tmp_path: Path) -> None:
    code, _, _ = run(*QUANTIZE, tmp_path / "q.onnx", "--recipe", "int8.onnx")
    assert code == 0
    assert (tmp_path / "q.onnx").read_bytes() == Path("int8.onnx").read_bytes()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no recipe"),
        ('{"recipe": null}', "holds no recipe"),
        ('{"per_chanel": true}', "'per_channel'"),
        ('{"method": "magic"}', "magic"),
    ],
)
def test_a_bad_recipe_is_a_user_error(run: Run, tmp_path: Path, text: str, part: str) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(text)
    assert_user_error(run(*QUANTIZE, tmp_path / "q.onnx", "--recipe", recipe), part)
    assert_user_error(run(*QUANTIZE, tmp_path / "q.onnx", "--recipe", "none.json"), "none.json")


def test_a_dynamic_model_is_compared_too(run: Run, tmp_path: Path) -> None:
    path = save(one_matmul(), tmp_path / "m.onnx")
    quantize_dynamic(path, tmp_path / "d.onnx", weight_type=QuantType.QInt8)
    code, out, _ = run("compare", path, tmp_path / "d.onnx", "--random", "2", "--json", "-")
    assert code == 0
    assert json.loads(out)["quantized_model"]["quant_format"] == "dynamic"


# ------------------------------------------------------------------------------- real models


@needs_models
def test_a_real_detector_gives_the_known_figure_and_fails_its_gate(run: Run) -> None:
    folder = MODELS / "fastestdet"
    words = ("compare", folder / "model.onnx", folder / "ort_static_qdq.onnx")
    words += ("--inputs", folder / "inputs", "--fail-under", "20", "--json", "-")
    code, out, err = run(*words)
    assert code == 1
    data = json.loads(out)
    (output,) = data["outputs"]
    assert output["sqnr_db"] == pytest.approx(10.58, abs=0.02)
    assert output["deployed_sqnr_db"] == pytest.approx(10.30, abs=0.1)
    assert data["headline"].startswith("Output 758 10.6 dB: ")
    assert "gate failed: output 758 has 10." in err


@pytest.mark.slow
@needs_models
def test_excluding_on_a_real_detector_is_reproduced_by_the_saved_list(
    run: Run, tmp_path: Path
) -> None:
    folder = MODELS / "fastestdet"
    words = ("quantize", folder / "model.onnx", "--inputs", folder / "inputs", "--top", "0")
    listed = tmp_path / "list.json"
    save_to = ("--save-exclusions", listed)
    code, out, _ = run(*words, "-o", tmp_path / "a.onnx", "--exclude", "Conv_2??", *save_to)
    assert code == 0
    assert "Output 758" in out
    assert len(json.loads(listed.read_text())["nodes"]) > 3
    assert run(*words, "-o", tmp_path / "b.onnx", "--exclude", listed)[0] == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_every_figure_in_the_json_is_strict(run: Run, tmp_path: Path) -> None:
    # Zeros make tensors without signal or without error, and so infinities.
    feeds = npz_folder(tmp_path / "in", [{"x": np.zeros((1, 3, 8, 8), np.float32)}] * 2)
    _, out, _ = run(*COMPARE[:3], "--inputs", feeds, "--json", "-")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    data = json.loads(out, parse_constant=refuse)
    assert strict(data) == data


def test_a_gate_that_a_hidden_collapse_passes_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    sample = ROOT / "sample_models" / "digit-detector"
    code = main(
        ["compare", str(sample / "float.onnx"), str(sample / "quantized.onnx"),
         "--inputs", str(sample / "feeds"), "--samples", "2", "--fail-under", "20"]
    )  # fmt: skip
    assert code == 0
    assert "warning: the gate passed, but: Output output0" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- recipes

RECIPES = ("recipes", "float.onnx", "--inputs", "inputs")


def test_recipes_are_a_table_best_first_with_the_command_that_makes_the_best(
    run: Run, tmp_path: Path
) -> None:
    target = tmp_path / "table.json"
    code, out, err = run(*RECIPES, "--most", "4", "--json", target)
    assert (code, err) == (0, "")
    table = json.loads(target.read_text(encoding="utf-8"))
    assert (table["format"], table["version"]) == ("quant-inspector/recipes", 1)
    done = [row for row in table["rows"] if row["state"] == "done"]
    assert len(done) == 4
    assert out.startswith(f"Best of 4 recipes: {done[0]['label']}, ")
    places = [out.index(f"  {row['label']} ") for row in done]
    assert places == sorted(places)
    numbers = [row["deployed_sqnr_db"] for row in done]
    assert numbers == sorted(numbers, reverse=True)
    assert "no kernels for S8 activations with U8 weights" in out.split("Not possible")[1]
    assert "68 recipes not tried" in out
    command = out.rstrip().splitlines()[-1].strip()
    assert command == table["command"]
    assert command.startswith("quant-inspector quantize float.onnx -o ")


def test_recipes_say_what_calibrated_and_how_many_samples_were_taken(
    run: Run, tmp_path: Path
) -> None:
    target = tmp_path / "table.json"
    code, out, _ = run(*RECIPES, "--most", "1", "--samples", "2", "--json", target)
    assert code == 0
    # Fewer than eight samples calibrate and are compared.
    assert "2 samples, all seen in calibration" in out
    table = json.loads(target.read_text(encoding="utf-8"))
    assert (table["samples"], table["seen_samples"]) == (2, 2)
    assert table["command"].endswith(" --samples 2")


def test_a_recipes_figures_are_those_of_compare_for_its_file(run: Run, tmp_path: Path) -> None:
    folder, target = tmp_path / "kept", tmp_path / "table.json"
    assert run(*RECIPES, "--most", "2", "--keep", folder, "--json", target)[0] == 0
    rows = [
        row
        for row in json.loads(target.read_text(encoding="utf-8"))["rows"]
        if row["state"] == "done"
    ]
    files = sorted(folder.iterdir())
    assert len(rows) == len(files) == 2
    for file in files:
        code, out, _ = run("compare", "float.onnx", file, "--inputs", "inputs", "--json", "-")
        assert code == 0
        whole = json.loads(out)
        row = next(r for r in rows if r["sha256"] == whole["quantized_model"]["sha256"])
        (mine,), (theirs,) = row["outputs"], whole["outputs"]
        for key in ("name", "sqnr_db", "deployed_sqnr_db"):
            assert mine[key] == (
                theirs[key] if key == "name" else pytest.approx(theirs[key], abs=1e-9)
            )
        assert row["size_bytes"] == whole["quantized_model"]["size_bytes"]


def test_the_command_of_the_best_recipe_makes_its_file(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(*RECIPES, "--most", "2", "--json", "-")
    table = json.loads(out)
    words = table["command"].split()[1:]
    words[words.index("-o") + 1] = str(tmp_path / "best.onnx")
    assert code == run(*words)[0] == 0
    assert load_model(tmp_path / "best.onnx").sha256 == table["rows"][0]["sha256"]


def test_recipes_start_from_a_recipe_and_need_feeds(run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"format": "dynamic"}), encoding="utf-8")
    code, out, _ = run(*RECIPES, "--recipe", recipe, "--most", "1", "--json", "-")
    assert code == 0
    assert len(json.loads(out)["rows"]) == 8
    assert_user_error(run("recipes", "float.onnx"), "give --inputs PATH")
    assert_user_error(run(*RECIPES, "--keep", "float.onnx"), "float.onnx is a file")
    assert_user_error(run(*RECIPES, "--json", "float.onnx"), "would be overwritten")
    assert_user_error(run(*RECIPES, "--mask", "nothing"), "no input 'nothing'")
    assert_user_error(run(*RECIPES, "--provider", "Nothing"), "has no 'Nothing'")


# -------------------------------------------------------------------------------------- free


FREE = ("free", "float.onnx", "int8.onnx")


def test_free_writes_a_file_says_what_changed_and_compares_it(run: Run, tmp_path: Path) -> None:
    out_file = tmp_path / "freed.onnx"
    code, out, err = run(*FREE, "-o", out_file, "--exclude", "gemm", "--inputs", "inputs")
    assert code == 0, err
    lines = out.splitlines()
    assert re.fullmatch(rf"wrote {out_file}: [\d.]+ kB, int8\.onnx has [\d.]+ kB", lines[0])
    assert "  gemm: still fed by Q/DQ" in lines
    assert any(line.startswith("Output y ") for line in lines)
    before, after = (onnx.load(p) for p in ("int8.onnx", out_file))
    names = {i.name for i in after.graph.initializer}
    assert {"gw", "w_quantized"} <= names
    assert "gw_quantized" in {i.name for i in before.graph.initializer} - names


def test_free_with_every_node_gives_the_float_models_figures(run: Run, tmp_path: Path) -> None:
    words = (*FREE, "-o", tmp_path / "freed.onnx", "--exclude", "*", "--random", "2")
    code, out, err = run(*words, "--json", "-")
    assert code == 0, err
    (output,) = json.loads(out)["outputs"]
    assert output["sqnr_db"] == "Infinity" or output["sqnr_db"] > 100
    assert "warning: * stands for 5 nodes" in err


def test_free_takes_the_lists_that_quantize_saves(run: Run, tmp_path: Path) -> None:
    listed = tmp_path / "list.json"
    made = ("quantize", "float.onnx", "-o", tmp_path / "q.onnx", "--inputs", "inputs")
    assert run(*made, "--exclude", "conv", "--save-exclusions", listed)[0] == 0
    code, out, err = run(*FREE, "-o", tmp_path / "freed.onnx", "--exclude", listed)
    assert code == 0, err
    assert "  conv: " in out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("-o", "int8.onnx", "--exclude", "conv"), ("int8.onnx is an input of this command",)),
        (("-o", "float.onnx", "--exclude", "conv"), ("float.onnx is an input of this command",)),
        (("-o", "OUT", "--exclude", "no such"), ("no node 'no such'",)),
        (("-o", "OUT", "--exclude", "none*"), ("the pattern 'none*' matches none",)),
        (("-o", "OUT"), ("Missing option '--exclude'",)),
        (("-o", "OUT", "--exclude", "conv", "--json", "-"), ("--json writes a comparison",)),
        (("-o", "no/OUT", "--exclude", "conv"), ("the folder", "does not exist")),
    ],
)
def test_free_refuses_what_it_cannot_do(
    run: Run, tmp_path: Path, words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    words = tuple(word.replace("OUT", str(tmp_path / "out.onnx")) for word in words)
    if "no/" in words[1]:
        words = ("-o", str(tmp_path / "no" / "out.onnx"), *words[2:])
    held = {p: p.read_bytes() for p in (Path("float.onnx"), Path("int8.onnx"))}
    assert_user_error(run(*FREE, *words), *parts)
    assert held == {p: p.read_bytes() for p in held}
    assert not list(tmp_path.iterdir())


def test_free_refuses_a_file_without_quantization(run: Run, tmp_path: Path) -> None:
    save(one_matmul(), tmp_path / "a.onnx")
    other = one_matmul()
    other.producer_name = "other"
    save(other, tmp_path / "b.onnx")
    words = ("free", tmp_path / "a.onnx", tmp_path / "b.onnx", "-o", tmp_path / "c.onnx")
    assert_user_error(run(*words, "--exclude", "matmul"), "nothing is quantized in b.onnx")
    assert not (tmp_path / "c.onnx").exists()


def test_isolated_adds_two_columns_and_two_figures_per_tensor(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(*COMPARE)
    assert code == 0
    assert "isolated" not in out
    target = tmp_path / "found.json"
    code, out, err = run(*COMPARE, "--isolated", "--json", target, "--csv", tmp_path / "found.csv")
    assert code == 0, err
    header = next(line for line in out.splitlines() if "accumulated" in line)
    assert re.search(r"local +isolated +added +worst channel", header)
    found = json.loads(target.read_text())["activations"]
    float_model, quantized = load_model("float.onnx"), load_model("int8.onnx")
    wanted = compare_models(
        float_model, quantized, load_feeds(Path("inputs"), float_model), isolated=True,
        measure_latency=False, explain_deployed=False,
    )  # fmt: skip
    assert [(a["name"], a["isolated_sqnr_db"], a["added_sqnr_db"]) for a in found] == [
        (a.name, strict(a.isolated_sqnr_db), strict(a.added_sqnr_db)) for a in wanted.activations
    ]
    relu = next(a for a in wanted.activations if a.op_type == "Relu")
    line = next(line for line in out.splitlines() if " Relu " in line)
    assert f"{relu.isolated_sqnr_db:.1f} dB" in line
    assert f"{relu.added_sqnr_db:.1f} dB" in line
    rows = list(csv.DictReader(io.StringIO((tmp_path / "found.csv").read_text())))
    assert {r["name"]: r["added_sqnr_db"] for r in rows if r["kind"] == "activation"}[
        relu.name
    ] == str(relu.added_sqnr_db)


# ------------------------------------------------------------------------------------ graph


@needs_models
def test_the_graph_command_ranks_nodes_by_the_comparisons_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = MODELS / "mlperf-resnet8"
    pair = [str(folder / "model.onnx"), str(folder / "ort_static_qdq.onnx")]
    feeds = ["--inputs", str(folder / "inputs"), "--samples", "2"]
    assert main(["compare", *pair, *feeds, "--isolated", "--json", str(tmp_path / "c.json")]) == 0
    compared = json.loads((tmp_path / "c.json").read_text())["activations"]
    own = [each for each in compared if each["node"] and each["added_sqnr_db"] is not None]
    capsys.readouterr()
    last = own[-1]["node"]
    arguments = ["--by", "added", "--upstream", last, "--skeletons", str(tmp_path / "graphs")]
    assert main(["graph", *pair, *feeds, *arguments, "--json", str(tmp_path / "g.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    sheet = json.loads((tmp_path / "g.json").read_text())
    shown = sheet["sides"]["float"]
    for each in own:
        assert shown[each["node"]]["figures"]["added"] == each["added_sqnr_db"]
    worst = min(own, key=lambda each: float(each["added_sqnr_db"]))
    assert worst["node"] in [line.split()[0] for line in lines[2:6]]
    assert lines[-1].startswith(f"the error of {last} comes from ")
    assert sheet["upstream"] == lines[-1].split()[-1]
    for side, path in zip(("float", "quantized"), pair, strict=True):
        light = onnx.load(tmp_path / "graphs" / f"{side}.onnx")
        assert len(light.graph.node) == len(onnx.load(path).graph.node)
        assert (tmp_path / "graphs" / f"{side}.onnx").stat().st_size < Path(path).stat().st_size


@needs_models
def test_upstream_of_a_node_that_is_not_there_names_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = MODELS / "mlperf-resnet8"
    pair = [str(folder / "model.onnx"), str(folder / "ort_static_qdq.onnx")]
    assert main(["graph", *pair, "--random", "1", "--upstream", "Conv_99"]) == 2
    assert "there is no such node of either model" in capsys.readouterr().err


# --------------------------------------------------------------------------------- diagnose

SILENT = ROOT / "sample_models" / "digit-detector"


def test_the_diagnosis_of_the_silent_detector_names_the_join_and_what_the_remedy_gains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(SILENT / "float.onnx"), str(SILENT / "quantized.onnx")]
    feeds = ["--inputs", str(SILENT / "feeds"), "--samples", "4"]
    assert main(["diagnose", *pair, *feeds, "--json", str(tmp_path / "d.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("● concat-shared-scale: ")
    remedy = "  Leave the Concat and what is quantized behind it in float, or store it in 16 bits."
    assert f"{remedy} (in float: " in out
    first = json.loads((tmp_path / "d.json").read_text())["findings"][0]
    assert (first["code"], first["severity"], first["node"]) == (
        "concat-shared-scale", "problem", "/head/Concat_3",
    )  # fmt: skip
    assert first["evidence"]["output_after_db"] > first["evidence"]["output_before_db"] + 10
    # The freed file has the figure that was measured.
    freed = tmp_path / "freed.onnx"
    names = [w for n in first["remedy"]["exclude"] for w in ("--exclude", n)]
    report = tmp_path / "f.json"
    assert main(["free", *pair, "-o", str(freed), *names, *feeds, "--json", str(report)]) == 0
    (output,) = json.loads(report.read_text())["outputs"]
    worst = min(float(each["sqnr_db"]) for each in output["slices"])
    assert worst == pytest.approx(first["evidence"]["output_after_db"], abs=1e-6)


def test_a_comparison_holds_its_findings_unless_they_are_not_wanted(tmp_path: Path) -> None:
    pair = [str(SILENT / "float.onnx"), str(SILENT / "quantized.onnx")]
    words = ["compare", *pair, "--inputs", str(SILENT / "feeds"), "--samples", "2"]
    report = tmp_path / "c.json"
    assert main([*words, "--json", str(report)]) == 0
    (found, *_) = json.loads(report.read_text())["findings"]
    assert found.keys() == {
        "code", "severity", "node", "tensor", "sentence", "evidence", "remedy",
    }  # fmt: skip
    assert main([*words, "--json", str(report), "--no-findings"]) == 0
    assert "findings" not in json.loads(report.read_text())
