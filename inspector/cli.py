"""argv to library to text and exit code: 0 good, 1 a gate failed, 2 the user can put it right.

The commands hold no logic of their own: what they print is what the app shows. ONNX and its
runtime are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from inspector.errors import Cancelled, ExclusionError, InspectorError, ModelError, ReportError
from inspector.guard import guarded

if TYPE_CHECKING:
    from inspector.backup import Backup
    from inspector.comparison import Comparison, OutputError, Pin
    from inspector.exclusions import ExclusionEntry, ExclusionList
    from inspector.feeds import Feeds
    from inspector.findings import Finding
    from inspector.model import Model
    from inspector.recipe import QuantConfig
    from inspector.task_metrics import TaskMetric

FAILED_GATE = 1
USER_ERROR = 2
INTERRUPTED = 130

Command = TypeVar("Command", bound=Callable[..., Any])

# ----------------------------------------------------------------------------------- output


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _show_version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    engine = ", ".join(f"{package} {_version(package)}" for package in ("onnxruntime", "onnx"))
    _print(f"quant-inspector {_version('quant-inspector')} ({engine})")
    context.exit()


class _WrongName(click.UsageError):
    """A name on the command line that means nothing, or more than one thing, in these models."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def _say(kind: str, text: str) -> None:
    """One line on stderr, whatever the names in it hold."""
    from inspector.render import LONGEST_WORD, printable

    click.echo(f"{kind}: {printable(text, LONGEST_WORD)}", err=True)


def _print(text: str | bytes) -> None:
    """Writes to stdout; a reader that has gone (``| head``) does not change the exit code."""
    try:
        click.echo(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered must not fail again when the interpreter closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(target: str, text: str) -> None:
    """Writes a result to a file, or to stdout for ``-``.

    Raises:
        ReportError: the file cannot be written.
    """
    text = text.removesuffix("\n")
    if target == "-":
        # UTF-8 whatever the terminal is set to
        _print(text.encode("utf-8", "backslashreplace"))
        return
    path = Path(target)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(f"{text}\n".encode("utf-8", "backslashreplace"))
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ReportError(
            f"{target} cannot be written: {error.strerror}",
            hint="Name a file in a folder that exists and may be written to.",
        ) from error


def _keep_inputs(inputs: Sequence[str | None], outputs: Sequence[str | None]) -> None:
    """Refuses to write a result over a file that was read.

    Raises:
        ReportError: an output is one of the inputs.
    """
    read = {Path(i).resolve(): i for i in inputs if i}
    for output in outputs:
        if output and output != "-" and Path(output).resolve() in read:
            raise ReportError(
                f"{output} is an input of this command and would be overwritten",
                hint="Name another file for the result.",
            )


@contextmanager
def _progress(title: str) -> Iterator[Callable[[float, str], None]]:
    """A `Progress` that draws a bar on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _fraction, _message: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from inspector.render import printable

    description = TextColumn("{task.description}", markup=False)
    columns = (description, BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)

        def show(fraction: float, message: str) -> None:
            bar.update(task, completed=fraction, description=f"{title}: {printable(message, 60)}")

        yield show


# ---------------------------------------------------------------------------------- options


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order given."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


# How both models are run.
_RUNS = _options(
    click.option(
        "--mask",
        default="",
        metavar="INPUT",
        help="Positions where this input is 0 are padding and do not count.",
    ),
    click.option(
        "--state",
        "states",
        multiple=True,
        metavar="OUTPUT=INPUT",
        help="Feed this output back into this input from sample to sample (repeat). In search "
        "and sensitivity, a value without = is the folder that keeps the trials.",
    ),
    click.option(
        "--provider",
        metavar="NAME",
        default="CPUExecutionProvider",
        show_default=True,
        help="ONNX Runtime's execution provider of the deployed runs.",
    ),
)
_FEEDS = _options(
    click.option(
        "--inputs",
        metavar="PATH",
        help="Feeds: a folder of .npz, .pb, images or texts, or one .npz or .npy file.",
    ),
    click.option(
        "--random", type=click.IntRange(min=1), metavar="N", help="N random feeds instead of data."
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        metavar="N",
        help="Seed of the random feeds.",
    ),
    click.option(
        "--samples",
        type=click.IntRange(min=1),
        metavar="N",
        help="Use the first N feeds of --inputs only.",
    ),
    click.option(
        "--preprocess",
        metavar="FILE",
        help="How images become feeds; default preprocess.json beside the images.",
    ),
)

_CALIBRATION = click.option(
    "--calibration",
    metavar="PATH",
    help="Feeds the ranges come from; default the first half of --inputs, at most 100.",
)
_RECIPE = _options(
    click.option("--recipe", metavar="FILE", help="Options from JSON or a quantized model."),
    click.option(
        "--format",
        type=click.Choice(["qdq", "qoperator", "dynamic"]),
        help="Static with Q/DQ pairs (default) or integer operators, or dynamic.",
    ),
    click.option(
        "--activation-type", metavar="TYPE", help="int8 (default), uint8, int16 or uint16."
    ),
    click.option(
        "--weight-type", metavar="TYPE", help="int8 (default), uint8, int16, uint16, int4 or uint4."
    ),
    click.option(
        "--method",
        type=click.Choice(["minmax", "entropy", "percentile"]),
        help="How ranges are chosen; default minmax.",
    ),
    click.option("--percentile", type=float, metavar="P", help="Share of values kept, in percent."),
    click.option(
        "--per-channel/--no-per-channel",
        default=None,
        help="A scale per output channel of a weight.",
    ),
    click.option("--reduce-range/--no-reduce-range", default=None, help="7 bits for weights."),
    click.option(
        "--activation-symmetric/--no-activation-symmetric",
        default=None,
        help="Ranges of activations symmetric about 0; default no.",
    ),
    click.option(
        "--weight-symmetric/--no-weight-symmetric",
        default=None,
        help="Ranges of weights symmetric about 0; default yes for signed types.",
    ),
    click.option(
        "--op-types",
        multiple=True,
        metavar="OP",
        help="Quantize these only (repeat or use commas).",
    ),
    click.option("--nodes", multiple=True, metavar="NODE", help="Quantize these only (repeat)."),
    click.option("--no-preprocess", is_flag=True, help="Quantize the graph as it is."),
    click.option(
        "--equalize/--no-equalize",
        default=None,
        help="Even out channel ranges between layers first (cross-layer equalization).",
    ),
    click.option(
        "--calibration-samples",
        type=click.IntRange(min=1),
        metavar="N",
        help="Calibrate on the first N calibration feeds only.",
    ),
    click.option(
        "--override",
        "overrides",
        multiple=True,
        metavar="TENSOR=LOW:HIGH",
        help="This range for a tensor (repeat); or TENSOR=int16, or TENSOR=SCALE@ZERO_POINT,TYPE.",
    ),
)
# The options above by their names in a recipe.
_RECIPE_KEYS = (
    "format", "activation_type", "weight_type", "method", "percentile", "per_channel",
    "reduce_range", "activation_symmetric", "weight_symmetric", "equalize", "calibration_samples",
)  # fmt: skip

# What else outputs are judged by.
_METRIC = _options(
    click.option(
        "--metric",
        "metrics",
        multiple=True,
        metavar="METRIC",
        help="Also this figure of the task (repeat), e.g. top1_drop or detection_f1:y@yolov8.",
    ),
    click.option(
        "--expected", metavar="FILE", help="Expected values for --metric expected, as CSV."
    ),
)

_JSON = click.option("--json", "json_file", metavar="FILE", help="Write JSON; - for stdout.")
_CSV = click.option(
    "--csv", "csv_file", metavar="FILE", help="Write a row per tensor; - for stdout."
)
_CLUSTER = click.option(
    "--cluster",
    default="",
    envvar="QUANT_INSPECTOR_CLUSTER",
    metavar="ADDRESS",
    help="Run on the workers of this Dask scheduler, e.g. tcp://10.0.0.5:8786.",
)
_TOP = click.option(
    "--top",
    type=click.IntRange(min=0),
    metavar="N",
    default=10,
    show_default=True,
    help="Rows of the tables of worst activations, weights and device tensors.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the versions of this tool, ONNX Runtime and ONNX.",
)
def cli() -> None:
    """Find out what quantization broke in an ONNX model, and put it right."""


# ------------------------------------------------------------------------------------- show


@cli.command()
@click.argument("model")
@_JSON
def show(model: str, json_file: str | None) -> None:
    """What a model file holds: graph, quantization and the recipe it was made with."""
    from inspector.render import dump_json, show_text
    from inspector.workbench import describe_model

    _keep_inputs([model], [json_file])
    with _progress("reading") as progress:
        description = describe_model(Path(model), progress=progress)
    for warning in description["warnings"]:
        _say("warning", warning)
    if json_file:
        _write(json_file, dump_json(description))
    if json_file != "-":
        _print(show_text(description))


# ---------------------------------------------------------------------------------- compare


def _need_feeds(options: Mapping[str, Any]) -> None:
    """Refuses a command line without feeds, before anything is loaded."""
    if not (options["inputs"] or options["random"]):
        raise click.UsageError("give --inputs PATH, or --random N where there is no data")


def _load_feeds(options: Mapping[str, Any], model: Model) -> Feeds | None:
    """The feeds that --inputs or --random name; None where neither is given."""
    from inspector.feeds import load_feeds, random_feeds

    if options["inputs"] and options["random"]:
        raise click.UsageError("--inputs and --random exclude each other")
    if options["random"]:
        for name in ("samples", "preprocess"):
            if options[name]:
                raise click.UsageError(f"--{name} goes with --inputs, not with --random")
        return random_feeds(model, samples=options["random"], seed=options["seed"])
    if not options["inputs"]:
        return None
    preprocess = Path(options["preprocess"]) if options["preprocess"] else None
    return load_feeds(
        Path(options["inputs"]), model, preprocess=preprocess, limit=options["samples"]
    )


def _load_calibration(options: Mapping[str, Any], model: Model) -> Feeds | None:
    from inspector.feeds import load_feeds

    if not options["calibration"]:
        return None
    preprocess = Path(options["preprocess"]) if options["preprocess"] else None
    return load_feeds(Path(options["calibration"]), model, preprocess=preprocess)


# What --state and --pin hold on either side of "=": an option's metavar, and whose it is.
_STATE = ("OUTPUT=INPUT", "output of the float model", "input of the float model")
_PIN = ("FLOAT=QUANTIZED", "tensor of the float model", "tensor of the quantized model")


def _tensor_names(model: Model) -> frozenset[str]:
    """Every tensor that a pin can name: inputs, constants and computed ones."""
    return model.constant_names.union(model.producers, (i.name for i in model.inputs))


def _nearest(name: str, names: Iterable[str]) -> str:
    """A hint that says which names there are."""
    from inspector.recipe import nearest_names

    near = nearest_names(name, names)
    return f"Nearest: {', '.join(near)}." if near else "There are none in this model."


def _known(option: str, name: str, names: Collection[str], what: str) -> str:
    """The name, which has to be one of `names`."""
    if name in names:
        return name
    raise _WrongName(f"{option} {name!r}: there is no such {what}", hint=_nearest(name, names))


def _split_pair(
    option: str,
    text: str,
    words: tuple[str, str, str],
    left: Collection[str],
    right: Collection[str],
) -> tuple[str, str]:
    """``A=B`` as (A, B). Names may hold "=" themselves, so the models decide where to split.

    Raises:
        click.UsageError: no "=", no split or more than one at which both names exist.
    """
    metavar, whose_left, whose_right = words
    splits = [(text[:i], text[i + 1 :]) for i, sign in enumerate(text) if sign == "="]
    if not splits:
        raise _WrongName(f"{option} {text!r} holds no '='", hint=f"Write {option} {metavar}.")
    fitting = [(a, b) for a, b in splits if a in left and b in right]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        ways = " or ".join(f"{a!r} and {b!r}" for a, b in fitting)
        raise _WrongName(
            f"{option} {text!r} can be read in {len(fitting)} ways: {ways}",
            hint="Call inspector.compare.compare_models from Python, where both names stand apart.",
        )
    if len(splits) == 1:
        _known(option, splits[0][0], left, whose_left)
        _known(option, splits[0][1], right, whose_right)
    # With one side right, the other is the slip.
    for a, b in splits:
        if a in left:
            hint = f"For {a} = … {_nearest(b, right)}"
            break
        if b in right:
            hint = f"For … = {b} {_nearest(a, left)}"
            break
    else:
        hint = f"Write {option} {metavar} with names of these models."
    raise _WrongName(
        f"{option} {text!r} names no {whose_left} and {whose_right}, at whichever '=' it is split",
        hint=hint,
    )


def _pins(
    pins: Sequence[str], refused: Sequence[str], float_model: Model, quantized_model: Model
) -> tuple[Pin, ...]:
    """What --pin and --refuse say, one record per float tensor."""
    from inspector.comparison import Pin

    if not pins and not refused:
        return ()
    left, right = _tensor_names(float_model), _tensor_names(quantized_model)
    found: dict[str, str | None] = {}
    given: list[tuple[str, str | None]] = [
        _split_pair("--pin", text, _PIN, left, right) for text in pins
    ]
    given += [(_known("--refuse", name, left, _PIN[1]), None) for name in refused]
    for name, partner in given:
        if found.setdefault(name, partner) != partner:
            options = "--pin and --refuse" if None in (found[name], partner) else "--pin"
            raise _WrongName(
                f"{options} say two things about {name!r}",
                hint=f"Give {name!r} one partner, or refuse it.",
            )
    return tuple(Pin(float_name=a, quantized_name=b) for a, b in found.items())


def _states(states: Sequence[str], model: Model) -> tuple[tuple[str, str], ...]:
    """What --state says, as (output, input) of the float model."""
    outputs, inputs = [o.name for o in model.outputs], [i.name for i in model.inputs]
    return tuple(_split_pair("--state", text, _STATE, outputs, inputs) for text in states)


def _task_metrics(
    texts: Iterable[str], model: Model, feeds: Feeds, expected: str | None
) -> tuple[TaskMetric, ...]:
    """What --metric says, each once."""
    from inspector.task_metrics import comparable_outputs, parse_metric

    outputs = comparable_outputs(model)
    path = None if expected is None else Path(expected)
    return tuple(
        parse_metric(text, outputs, feeds, expected=path, allow_code=True)
        for text in dict.fromkeys(texts)
    )


def _report(
    comparison: Comparison,
    *,
    json_file: str | None,
    csv_file: str | None,
    top: int,
    findings: Sequence[Finding] | None = None,
) -> None:
    """Warnings to stderr, files where they are wanted, text to stdout unless a file goes there."""
    from inspector.render import comparison_csv, comparison_json, comparison_text, dump_json

    for warning in comparison.warnings:
        _say("warning", warning)
    if json_file:
        data = comparison_json(comparison)
        if findings is not None:
            data["findings"] = [each.to_json() for each in findings]
        _write(json_file, dump_json(data))
    if csv_file:
        _write(csv_file, comparison_csv(comparison))
    if "-" not in (json_file, csv_file):
        # Names take what the figures leave; a file gets them nearly whole.
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 160
        width = max(24, columns - 90)
        _print(comparison_text(comparison, top=top, name_width=width, warnings=False))
        if findings:
            _print("")
            _print_findings(findings, top=_FINDINGS_BESIDE)


# So many findings stand below a comparison; `diagnose` has them all.
_FINDINGS_BESIDE = 3
_SIGNS = {"problem": "●", "look": "▲", "note": "–"}


def _print_findings(findings: Sequence[Finding], *, top: int) -> None:
    """A line for what is wrong and one for what to do, most important first."""
    from inspector.render import LONGEST_WORD, format_db, printable

    shown = findings[:top]
    for each in shown:
        gain = each.evidence.get("output_gain_db")
        _print(printable(f"{_SIGNS[each.severity]} {each.code}: {each.sentence}", LONGEST_WORD))
        measured = []
        if gain is not None:
            ends = (each.evidence["output_before_db"], each.evidence["output_after_db"])
            measured.append(f"in float: {' → '.join(map(format_db, ends))}")
        if "recipe_gain_db" in each.evidence:
            ends = (each.evidence["recipe_before_db"], each.evidence["recipe_after_db"])
            measured.append(f"re-quantized: {' → '.join(map(format_db, ends))}")
        elif "recipe_not_measured" in each.evidence:
            measured.append(f"not measured: {each.evidence['recipe_not_measured']}")
        said = f" ({'; '.join(measured)})" if measured else ""
        _print(printable(f"  {each.remedy.say}{said}", LONGEST_WORD))
    if len(findings) > len(shown):
        _print(f"and {len(findings) - len(shown)} more: quant-inspector diagnose lists them")


def _with_paths(comparison: Comparison, float_model: str, quantized_model: str) -> Comparison:
    """The comparison with both files called as on the command line."""
    return replace(
        comparison,
        float_model=replace(comparison.float_model, path=float_model),
        quantized_model=replace(comparison.quantized_model, path=quantized_model),
    )


def _gate(outputs: Sequence[OutputError], threshold: float, *, simulated: bool) -> list[str]:
    """Why the gate fails, one clause per output; empty where it holds."""
    from inspector.render import format_db

    if not outputs:
        return ["no output could be compared"]
    which = "simulated" if simulated else "deployed"
    found = [(o.name, o.sqnr_db if simulated else o.deployed_sqnr_db) for o in outputs]
    return [
        f"output {name} has {format_db(value)} {which}, wanted at least {format_db(threshold)}"
        for name, value in found
        if math.isnan(value) or value < threshold
    ]


def _goals(texts: Sequence[str]) -> tuple[float | None, dict[str, float]]:
    """What --fail-under says: decibels of every output, and numbers by task metric."""
    from inspector.task_metrics import split_target

    least, goals = None, {}
    for text in texts:
        if "=" in text:
            metric, goals[metric] = split_target(text)
            continue
        try:
            least = float(text)
        except ValueError:
            least = math.nan
        if math.isnan(least):
            raise click.UsageError("--fail-under takes a number of decibels, or METRIC=VALUE")
    return least, goals


def _metric_gate(
    comparison: Comparison, goals: Mapping[str, float], *, simulated: bool
) -> list[str]:
    """Why the gate fails, one clause per metric that is worse than wanted."""
    from inspector.render import format_figure
    from inspector.task_metrics import misses

    which = "simulated" if simulated else "deployed"
    found = {figure.metric: figure for figure in comparison.metrics}
    failures = []
    for metric, wanted in goals.items():
        figure = found.get(metric)
        if figure is None:
            failures.append(f"{metric} could not be measured")
            continue
        value = figure.simulated if simulated else figure.deployed
        if misses(value, wanted, higher_is_better=figure.higher_is_better):
            bound = "at least" if figure.higher_is_better else "at most"
            shown, limit = (format_figure(v, figure.unit) for v in (value, wanted))
            failures.append(f"{metric} is {shown} {which}, wanted {bound} {limit}")
    return failures


@cli.command()
@click.argument("float_model", metavar="FLOAT")
@click.argument("quantized_model", metavar="QUANTIZED")
@_FEEDS
@click.option(
    "--calibration",
    metavar="PATH",
    help="Feeds the ranges came from: tells seen from unseen figures.",
)
@_JSON
@_CSV
@_TOP
@click.option(
    "--fail-under",
    multiple=True,
    metavar="DB|METRIC=VALUE",
    help="Exit 1 where a deployed output is below, or a metric worse (repeat).",
)
@click.option(
    "--simulated", is_flag=True, help="--fail-under judges outputs with optimisations off."
)
@_METRIC
@_RUNS
@click.option(
    "--actual", metavar="DIR", help="Tensors dumped from a device, to put beside these figures."
)
@click.option(
    "--pin",
    "pins",
    multiple=True,
    metavar="FLOAT=QUANTIZED",
    help="Compare these two tensors, whatever the rules say (repeat).",
)
@click.option(
    "--refuse", multiple=True, metavar="FLOAT", help="This float tensor has no partner (repeat)."
)
@click.option(
    "--isolated",
    is_flag=True,
    help="Also the error of each node alone and the error it adds; takes about twice as long.",
)
@click.option("--no-findings", is_flag=True, help="Leave out what the figures say is wrong.")
def compare(
    float_model: str,
    quantized_model: str,
    json_file: str | None,
    csv_file: str | None,
    top: int,
    fail_under: tuple[str, ...],
    simulated: bool,
    metrics: tuple[str, ...],
    expected: str | None,
    mask: str,
    states: tuple[str, ...],
    provider: str,
    actual: str | None,
    pins: tuple[str, ...],
    refuse: tuple[str, ...],
    isolated: bool,
    no_findings: bool,
    **options: Any,
) -> int:
    """Where a quantized model departs from its float model, tensor by tensor."""
    if simulated and not fail_under:
        raise click.UsageError("--simulated says what --fail-under judges: give that too")
    least_db, goals = _goals(fail_under)
    if json_file == csv_file == "-":
        raise click.UsageError("only one of --json and --csv can go to stdout")
    _need_feeds(options)
    from inspector.compare import compare_models
    from inspector.devices import load_dump
    from inspector.feeds import split_calibration
    from inspector.model_files import load_model
    from inspector.render import find_headline, unknown_deployed

    _keep_inputs([float_model, quantized_model, actual, expected], [json_file, csv_file])
    reference, quantized = load_model(float_model), load_model(quantized_model)
    carried = _states(states, reference)
    matched = _pins(pins, refuse, reference, quantized)
    feeds = _load_feeds(options, reference)
    assert feeds is not None
    calibration = _load_calibration(options, reference)
    seen = None if calibration is None else split_calibration(feeds, calibration).seen
    dump = None if actual is None else load_dump(Path(actual), feeds.names)
    with _progress("comparing") as progress:
        comparison = compare_models(
            reference,
            quantized,
            feeds,
            seen=seen,
            pins=matched,
            mask=mask,
            states=carried,
            provider=provider,
            actual=dump,
            isolated=isolated,
            metrics=_task_metrics((*metrics, *goals), reference, feeds, expected),
            progress=progress,
        )
    comparison = _with_paths(comparison, float_model, quantized_model)
    findings = None
    if not no_findings:
        from inspector.diagnosis import diagnose
        from inspector.findings import case_of

        findings = diagnose(case_of(comparison, reference, quantized))
    _report(comparison, json_file=json_file, csv_file=csv_file, top=top, findings=findings)
    failures = [] if least_db is None else _gate(comparison.outputs, least_db, simulated=simulated)
    failures += _metric_gate(comparison, goals, simulated=simulated)
    if failures and not simulated and unknown_deployed(comparison):
        failures = [unknown_deployed(comparison)]
    for failure in failures:
        _say("gate failed", failure)
    found = find_headline(comparison)
    if fail_under and not failures and found.severity == "problem":
        _say("warning", f"the gate passed, but: {found.sentence}")
    return FAILED_GATE if failures else 0


# --------------------------------------------------------------------------------- quantize


def _read_recipe_file(path: str, float_model: Model) -> QuantConfig:
    """The recipe in a JSON file (alone, or the "recipe" of a list), or read back from a model."""
    from inspector.model_files import load_model
    from inspector.recipe import QuantConfig, read_recipe

    hint = "Name a recipe (JSON), an exclusion list that holds one, or a quantized model."
    if not path.lower().endswith(".json"):
        recipe = read_recipe(load_model(path), float_model)
        for note in recipe.notes:
            _say("warning", note)
        return recipe.config
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"recipe {path} cannot be read: {error.strerror}", hint=hint) from error
    except ValueError as error:
        raise ReportError(f"recipe {path} is not JSON: {error}", hint=hint) from error
    if isinstance(data, dict) and "recipe" in data:
        data = data["recipe"]
    if not isinstance(data, dict):
        raise ReportError(f"{path} holds no recipe", hint=hint)
    return QuantConfig.from_json(data)


def _config(options: Mapping[str, Any], base: QuantConfig) -> QuantConfig:
    """The recipe with every option that was given put in its place."""
    from inspector.recipe import QuantConfig, parse_override

    changes = {key: options[key] for key in _RECIPE_KEYS if options[key] is not None}
    op_types = [t.strip() for given in options["op_types"] for t in given.split(",")]
    if op_types:
        changes["op_types"] = [t for t in op_types if t]
    if options["nodes"]:
        changes["nodes"] = list(options["nodes"])
    if options["no_preprocess"]:
        changes["preprocess"] = False
    if options["overrides"]:
        changes["overrides"] = [parse_override(text).to_json() for text in options["overrides"]]
    config = QuantConfig.from_json({**base.to_json(), **changes})
    if options["percentile"] is not None and config.method != "percentile":
        raise click.UsageError("--percentile goes with --method percentile")
    return config


def _read_lists(paths: Sequence[str]) -> list[tuple[str, ExclusionList]]:
    from inspector.exclusions import read_exclusions

    return [(path, read_exclusions(Path(path))) for path in paths]


def _base_recipe(
    options: Mapping[str, Any], lists: Sequence[tuple[str, ExclusionList]], float_model: Model
) -> QuantConfig:
    """The recipe to start from: --recipe, else the one the lists were made with, else defaults.

    Raises:
        ExclusionError: the lists were made with different recipes.
    """
    from inspector.recipe import QuantConfig

    if options["recipe"]:
        return _read_recipe_file(options["recipe"], float_model)
    held = [(path, entry.recipe) for path, entry in lists if entry.recipe is not None]
    if not held:
        return QuantConfig()
    path, recipe = held[0]
    for other, another in held[1:]:
        if another != recipe:
            raise ExclusionError(
                f"{path} and {other} were made with different recipes",
                hint="Give --recipe FILE to say which one is meant.",
            )
    _say("note", f"the recipe is the one in {path}")
    return recipe


def _entries(
    names: Sequence[str], lists: Sequence[tuple[str, ExclusionList]], models: Sequence[Model]
) -> tuple[ExclusionEntry, ...]:
    """What a saved list says about each node; reasons and gains in the lists given are kept."""
    from inspector.exclusions import ExclusionEntry

    known = {entry.name: entry for _, held in lists for entry in held.nodes}
    entries = []
    for name in names:
        # The float file's node, or one that pre-processing added.
        node = next(m.node_by_name[name] for m in models if name in m.node_by_name)
        entry = known.get(name, ExclusionEntry(name=name))
        entries.append(replace(entry, op_type=node.op_type, outputs=node.outputs))
    return tuple(entries)


def _measured(comparison: Comparison | None) -> dict[str, Any] | None:
    """What a saved list says it gave: the worst output; "before" is not measured here."""
    if comparison is None or not comparison.outputs:
        return None
    worst = min(comparison.outputs, key=lambda o: -math.inf if math.isnan(o.sqnr_db) else o.sqnr_db)
    after = {"before": None, "after": worst.sqnr_db}
    return {"samples": comparison.samples, "output": worst.name, "output_sqnr_db": after}


@cli.command()
@click.argument("float_model", metavar="FLOAT")
@click.option("-o", "--output", required=True, metavar="OUT", help="The quantized model to write.")
@_FEEDS
@_CALIBRATION
@click.option(
    "--exclude",
    multiple=True,
    metavar="X",
    help="Leave in float (repeat): a node, a pattern of * and ?, or a list ending in .json.",
)
@click.option(
    "--accept-other-model", is_flag=True, help="Use a list that was made for another model."
)
@_RECIPE
@click.option("--save-exclusions", metavar="FILE", help="Write what was excluded as a list.")
@_JSON
@_TOP
def quantize(
    float_model: str,
    output: str,
    exclude: tuple[str, ...],
    accept_other_model: bool,
    save_exclusions: str | None,
    json_file: str | None,
    top: int,
    **options: Any,
) -> None:
    """Quantize a float model with ONNX Runtime's quantizer and compare the result."""
    from inspector.compare import compare_models
    from inspector.exclusions import (
        ExclusionList,
        check_same_model,
        effect_of,
        override_effects,
        resolve,
        write_exclusions,
    )
    from inspector.feeds import split_calibration
    from inspector.model_files import load_model
    from inspector.prepare import prepare
    from inspector.quantize import quantize_model
    from inspector.render import LONGEST_WORD, printable, shorten_name
    from inspector.store import Workspace, default_root

    paths = [x for x in exclude if x.lower().endswith(".json")]
    read = [float_model, options["recipe"], options["preprocess"], *paths]
    _keep_inputs(read, [output, save_exclusions, json_file])
    model = load_model(float_model)
    lists = _read_lists(paths)
    config = _config(options, _base_recipe(options, lists, model))
    notes = [
        *model.notes,
        *(n for _, held in lists for n in check_same_model(held, model, accept_other_model)),
    ]
    feeds = _load_feeds(options, model)
    calibration_feeds = _load_calibration(options, model)
    if config.static and feeds is None and calibration_feeds is None:
        raise click.UsageError(
            f"--format {config.format} needs feeds: give --inputs PATH or --calibration PATH"
        )
    cache = Workspace(default_root()).cache
    with _progress("quantizing") as progress:
        prepared = prepare(model, config, cache)
        wanted = [
            *(x for x in exclude if x not in paths),
            *(entry.name for _, held in lists for entry in held.nodes),
            *(pattern for _, held in lists for pattern in held.patterns),
        ]
        resolved = resolve(wanted, model, prepared=prepared)
        split = None
        if feeds is not None:
            split = split_calibration(feeds, calibration_feeds, limit=config.calibration_samples)
        made = quantize_model(
            model,
            config,
            calibration=calibration_feeds if split is None else split.calibration,
            exclude=resolved.names,
            output=Path(output),
            cache=cache,
            progress=progress,
        )
    notes = list(dict.fromkeys((*notes, *prepared.notes, *resolved.notes, *made.notes)))
    quantized = load_model(output)
    comparison = None
    if feeds is not None and split is not None:
        seen = split.seen if config.static else (False,) * len(feeds)
        with _progress("comparing") as progress:
            comparison = compare_models(model, quantized, feeds, seen=seen, progress=progress)
    if save_exclusions:
        saved = ExclusionList(
            nodes=_entries(resolved.names, lists, [model, prepared.model]),
            float_name=model.name,
            float_sha256=model.sha256,
            recipe=config,
            measured=_measured(comparison),
        )
        write_exclusions(saved, Path(save_exclusions))
    if json_file != "-":
        _print(printable(f"wrote {output}"))
        effects = (
            *effect_of(resolved.prepared_names, prepared.model, quantized, None),
            *override_effects(prepared.model, quantized, config),
        )
        for effect in effects:
            lines = (f"  {shorten_name(effect.name, 80)}: {effect.status}", *effect.details)
            _print("\n    ".join(printable(line, LONGEST_WORD) for line in lines))
    if comparison is None:
        for note in notes:
            _say("warning", note)
        return
    warnings = tuple(dict.fromkeys((*notes, *comparison.warnings)))
    comparison = _with_paths(comparison, float_model, output)
    _report(replace(comparison, warnings=warnings), json_file=json_file, csv_file=None, top=top)


# ---------------------------------------------------------------------------------- recipes


@cli.command()
@click.argument("float_model", metavar="FLOAT")
@_FEEDS
@_CALIBRATION
@click.option(
    "--recipe",
    metavar="FILE",
    help="What is not varied comes from here: JSON or a quantized model.",
)
@click.option(
    "--most",
    type=click.IntRange(min=1),
    metavar="N",
    help="Try N recipes at most, the most promising first.",
)
@click.option("--keep", metavar="FOLDER", help="Keep the models, one file per recipe.")
@_METRIC
@_RUNS
@_CLUSTER
@_JSON
def recipes(
    float_model: str,
    recipe: str | None,
    most: int | None,
    keep: str | None,
    cluster: str,
    metrics: tuple[str, ...],
    expected: str | None,
    mask: str,
    states: tuple[str, ...],
    provider: str,
    json_file: str | None,
    **options: Any,
) -> int:
    """Try the recipes that can be, and set beside each other what they give and cost.

    Method, per tensor or channel, symmetry, 8-bit types and range are varied. Ctrl-C shows what is
    there so far.
    """
    _need_feeds(options)
    if keep and cluster:
        raise click.UsageError("--keep keeps what this machine makes: leave out it or --cluster")
    from inspector.cluster import recipes_at
    from inspector.feeds import split_calibration
    from inspector.model_files import load_model
    from inspector.recipe import QuantConfig
    from inspector.recipe_table import RecipeResult, recipe_grid, recipes_json, run_recipes
    from inspector.render import dump_json, recipes_text
    from inspector.store import Workspace, default_root

    _keep_inputs([float_model, recipe, options["preprocess"], expected], [json_file])
    if keep and Path(keep).exists() and not Path(keep).is_dir():
        raise ReportError(
            f"{keep} is a file, expected a folder for the models",
            hint="Name a folder; it is made where there is none.",
        )
    model = load_model(float_model)
    _need_float(model, float_model)
    config = QuantConfig() if recipe is None else _read_recipe_file(recipe, model)
    carried = _states(states, model)
    feeds = _load_feeds(options, model)
    assert feeds is not None
    calibration = _load_calibration(options, model)
    split = split_calibration(feeds, calibration, limit=config.calibration_samples)
    judged_by = _task_metrics(metrics, model, feeds, expected)
    rows = recipe_grid(config)
    for note in dict.fromkeys((*model.notes, *feeds.notes)):
        _say("warning", note)
    results: list[RecipeResult] = []

    started = 0

    def enough() -> bool:
        nonlocal started
        started += 1
        return most is not None and started > most

    runs: dict[str, Any] = {
        "rows": rows, "mask": mask, "states": carried, "provider": provider, "metrics": judged_by,
    }  # fmt: skip
    stopped = False
    try:
        with (
            _progress("trying") as progress,
            recipes_at(
                cluster,
                model,
                feeds,
                split,
                **runs,
                expected=Path(expected) if expected else None,
                progress=progress,
            ) as elsewhere,
        ):
            for result in run_recipes(
                model,
                feeds,
                split,
                **runs,
                cache=Workspace(default_root()).cache,
                output_folder=Path(keep) if keep else None,
                elsewhere=elsewhere,
                progress=progress,
                stop=enough,
            ):
                results.append(result)
    except KeyboardInterrupt:
        if not any(not r.row.reason for r in results):
            raise
        stopped = True
        _say("note", "stopped: what follows is what was there")
    table = recipes_json(
        model,
        feeds,
        results,
        planned=rows,
        seen=split.seen,
        inputs=options["inputs"],
        calibration=options["calibration"],
        float_name=float_model,
        further=_feed_words(options),
    )
    if json_file:
        _write(json_file, dump_json(table))
    if json_file != "-":
        _print(recipes_text(table))
    return INTERRUPTED if stopped else 0


def _need_float(model: Model, shown: str) -> None:
    """Refuses a model that is quantized already.

    Raises:
        ModelError: it is.
    """
    from inspector.scheme import COMPUTES_IN_INTEGERS, quant_formats

    formats = COMPUTES_IN_INTEGERS.intersection(quant_formats(model))
    if formats:
        raise ModelError(
            f"{shown} is quantized already ({'+'.join(sorted(formats))}), expected a float model",
            hint="Give the float model that it was made from.",
        )


def _feed_words(options: Mapping[str, Any]) -> list[str]:
    """The options about feeds, but for the paths, as words of a command line."""
    words: list[str] = []
    if options["random"]:
        words += ["--random", str(options["random"]), "--seed", str(options["seed"])]
    if options["samples"]:
        words += ["--samples", str(options["samples"])]
    if options["preprocess"]:
        words += ["--preprocess", str(options["preprocess"])]
    return words


# ------------------------------------------------------------------------------------- free


@cli.command()
@click.argument("float_model", metavar="FLOAT")
@click.argument("quantized_model", metavar="QUANTIZED")
@click.option("-o", "--output", required=True, metavar="OUT", help="The model to write.")
@click.option(
    "--exclude",
    multiple=True,
    required=True,
    metavar="X",
    help="Leave in float (repeat): a node, a pattern of * and ?, or a list ending in .json.",
)
@click.option(
    "--accept-other-model", is_flag=True, help="Use a list that was made for another model."
)
@_FEEDS
@_JSON
@_TOP
def free(
    float_model: str,
    quantized_model: str,
    output: str,
    exclude: tuple[str, ...],
    accept_other_model: bool,
    json_file: str | None,
    top: int,
    **options: Any,
) -> None:
    """Leave nodes of a finished quantized model in float, whatever tool made it.

    Their Q/DQ pairs go and the float model's weights come back; every other scale stays. With
    feeds the result is compared with the float model.
    """
    from inspector.compare import compare_models
    from inspector.equalize import comparable_float
    from inspector.exclusions import check_same_model, resolve
    from inspector.freed_file import write_freed
    from inspector.matching import match_tensors
    from inspector.model_files import load_model
    from inspector.render import LONGEST_WORD, format_bytes, printable, shorten_name
    from inspector.rewrite import free_nodes

    paths = [x for x in exclude if x.lower().endswith(".json")]
    read = [float_model, quantized_model, options["preprocess"], *paths]
    _keep_inputs(read, [output, json_file])
    if json_file and not (options["inputs"] or options["random"]):
        raise click.UsageError("--json writes a comparison: give --inputs PATH, or --random N")
    reference, quantized = load_model(float_model), load_model(quantized_model)
    lists = _read_lists(paths)
    notes = [
        *reference.notes,
        *(n for _, held in lists for n in check_same_model(held, reference, accept_other_model)),
    ]
    wanted = [
        *(x for x in exclude if x not in paths),
        *(entry.name for _, held in lists for entry in held.nodes),
        *(pattern for _, held in lists for pattern in held.patterns),
    ]
    resolved = resolve(wanted, reference)
    feeds = _load_feeds(options, reference)
    made_of = comparable_float(reference, quantized)
    matching = match_tensors(made_of, quantized)
    freed = free_nodes(made_of, quantized, matching, resolved.names)
    notes += resolved.notes
    notes += write_freed(
        freed, output, inputs=[reference, quantized], matching=matching, feeds=feeds
    )
    notes = list(dict.fromkeys(notes))
    result = load_model(output)
    if json_file != "-":
        before, after = (format_bytes(m.size_bytes) for m in (quantized, result))
        _print(printable(f"wrote {output}: {after}, {quantized_model} has {before}"))
        for effect in freed.effects:
            lines = (f"  {shorten_name(effect.name, 80)}: {effect.status}", *effect.details)
            _print("\n    ".join(printable(line, LONGEST_WORD) for line in lines))
    if feeds is None:
        for note in notes:
            _say("warning", note)
        return
    with _progress("comparing") as progress:
        comparison = compare_models(reference, result, feeds, progress=progress)
    warnings = tuple(dict.fromkeys((*notes, *comparison.warnings)))
    comparison = _with_paths(comparison, float_model, output)
    _report(replace(comparison, warnings=warnings), json_file=json_file, csv_file=None, top=top)


# ------------------------------------------------------------------------------- exclusions


@cli.command()
@click.argument("exclusion_list", metavar="LIST")
@click.option(
    "--model", "float_model", required=True, metavar="FLOAT", help="The float model it is for."
)
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(["ort", "olive", "quark", "nncf", "modelopt"]),
    help="The tool that shall take it: JSON for Olive, Python for the others.",
)
@click.option(
    "-o", "--output", default="-", metavar="FILE", help="Write it there; default - for stdout."
)
@click.option(
    "--accept-other-model", is_flag=True, help="Use a list that was made for another model."
)
def exclusions(
    exclusion_list: str,
    float_model: str,
    target: str,
    output: str,
    accept_other_model: bool,
) -> None:
    """An exclusion list as another tool takes it, naming the same nodes."""
    from inspector.exclusions import check_same_model, read_exclusions
    from inspector.list_exports import export, needs_preparing
    from inspector.model_files import load_model
    from inspector.prepare import prepare
    from inspector.recipe import QuantConfig
    from inspector.render import printable
    from inspector.store import Workspace, default_root

    _keep_inputs([exclusion_list, float_model], [output])
    held = read_exclusions(Path(exclusion_list))
    model = load_model(float_model)
    notes = [*model.notes, *check_same_model(held, model, accept_other_model)]
    prepared = None
    if needs_preparing(held, model, target):
        with _progress("preparing"):
            config = held.recipe or QuantConfig()
            prepared = prepare(model, config, Workspace(default_root()).cache)
    made = export(held, model, target, prepared=prepared)
    for note in dict.fromkeys((*notes, *made.notes)):
        _say("warning", note)
    _write(output, made.text)
    if output != "-":
        _print(printable(f"wrote {output}"))


# --------------------------------------------------------------------------------- diagnose


@cli.command()
@click.argument("float_model", metavar="FLOAT")
@click.argument("quantized_model", metavar="QUANTIZED")
@_FEEDS
@_RUNS
@click.option("--isolated", is_flag=True, help="Rank by the error each node adds; takes longer.")
@_JSON
@click.option(
    "--recipe", metavar="FILE", help="What was asked for: JSON or a quantized model's own recipe."
)
@click.option("--no-preview", is_flag=True, help="Do not measure what remedies gain.")
def diagnose(
    float_model: str,
    quantized_model: str,
    mask: str,
    states: tuple[str, ...],
    provider: str,
    isolated: bool,
    json_file: str | None,
    recipe: str | None,
    no_preview: bool,
    **options: Any,
) -> None:
    """What broke a quantized model, with evidence, remedy and what the remedy gains."""
    _need_feeds(options)
    from inspector import diagnosis
    from inspector.compare import compare_models
    from inspector.feeds import split_calibration
    from inspector.findings import case_of
    from inspector.live import surgery_gain
    from inspector.model_files import load_model
    from inspector.recipe import QuantConfig, quantizer_format, read_recipe
    from inspector.render import dump_json
    from inspector.store import Workspace, default_root

    _keep_inputs([float_model, quantized_model, recipe], [json_file])
    reference, quantized = load_model(float_model), load_model(quantized_model)
    carried = _states(states, reference)
    asked = None if recipe is None else _read_recipe_file(recipe, reference).to_json()
    feeds = _load_feeds(options, reference)
    assert feeds is not None
    with _progress("comparing") as progress:
        comparison = compare_models(
            reference,
            quantized,
            feeds,
            mask=mask,
            states=carried,
            provider=provider,
            isolated=isolated,
            progress=progress,
        )
    comparison = _with_paths(comparison, float_model, quantized_model)
    case = case_of(comparison, reference, quantized, asked)
    with _progress("measuring remedies") as progress:
        gain_of, recipe_gain_of = None, None
        if not no_preview:
            gain_of = surgery_gain(case, feeds, mask=mask, states=carried, progress=progress)
        if not no_preview and (asked or quantizer_format(quantized)):
            own = read_recipe(quantized).config if asked is None else QuantConfig.from_json(asked)
            recipe_gain_of = diagnosis.requantized_gain(
                case,
                own,
                feeds,
                split_calibration(feeds, limit=own.calibration_samples),
                cache=Workspace(default_root()).cache,
                float_model=reference,
                mask=mask,
                states=carried,
                progress=progress,
            )
        findings = diagnosis.diagnose(
            case, gain_of=gain_of, recipe_gain_of=recipe_gain_of, progress=progress
        )
    if json_file:
        _write(json_file, dump_json({
            "format": "quant-inspector/findings", "version": 1,
            "float_model": float_model, "quantized_model": quantized_model,
            "samples": comparison.samples, "findings": [each.to_json() for each in findings],
        }))  # fmt: skip
    if json_file != "-":
        if findings:
            _print_findings(findings, top=len(findings))
        else:
            _print("✓ no rule finds anything wrong")
    for warning in comparison.warnings:
        _say("warning", warning)


# ------------------------------------------------------------------------------ sensitivity


@cli.command()
@click.argument("float_model", metavar="FLOAT")
@_FEEDS
@_CALIBRATION
@click.option(
    "--quantized", metavar="FILE", help="Free nodes in this finished file; no recipe is used."
)
@click.option(
    "--metric",
    default="output_sqnr_db",
    show_default=True,
    metavar="METRIC",
    help="What is measured, e.g. output_sqnr_db:scores or top1_drop.",
)
@click.option("--expected", metavar="FILE", help="Expected values for the metric expected, as CSV.")
@click.option(
    "--by",
    type=click.Choice(["node", "block", "op-type"]),
    default="node",
    show_default=True,
    help="What a row is of; a block is what shares the path before the last / of a name.",
)
@click.option(
    "--node", "only", multiple=True, metavar="X", help="Measure these (repeat): a node or pattern."
)
@click.option(
    "--way",
    "ways",
    multiple=True,
    type=click.Choice(["only", "without"]),
    help="Only this quantized, or all without this (repeat); default both.",
)
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(["both", "weights", "activations"]),
    help="What --way only quantizes (repeat); default both together.",
)
@click.option(
    "--coarse",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    metavar="N",
    help="Look at N samples first and at all only for the most sensitive; 0 takes all at once.",
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="End after so long with what is there.",
)
@_CLUSTER
@_RECIPE
@_RUNS
@_TOP
@_JSON
def sensitivity(
    float_model: str,
    quantized: str | None,
    metric: str,
    expected: str | None,
    by: str,
    only: tuple[str, ...],
    ways: tuple[str, ...],
    parts: tuple[str, ...],
    coarse: int,
    budget: float | None,
    cluster: str,
    mask: str,
    states: tuple[str, ...],
    provider: str,
    top: int,
    json_file: str | None,
    **options: Any,
) -> int:
    """What each node, block or operator type costs: only it quantized, and all without it.

    Simulated. With --state DIR trials are kept there, and what was stopped goes on where it was.
    Ctrl-C shows what is there so far.
    """
    begin = time.monotonic()
    _need_feeds(options)
    from inspector.cluster import trials_at
    from inspector.exclusions import resolve
    from inspector.feeds import split_calibration
    from inspector.model_files import load_model
    from inspector.quantizer import UnplannableError
    from inspector.render import LONGEST_WORD, dump_json, printable, sensitivity_lines
    from inspector.sensitivity import PARTS, WAYS, measure_sensitivity
    from inspector.store import Workspace, default_root

    read = [float_model, quantized, options["recipe"], options["preprocess"], expected]
    _keep_inputs(read, [json_file])
    folder, carried_texts = _trials_folder(states)
    model = load_model(float_model)
    _need_float(model, float_model)
    config = _config(options, _base_recipe(options, [], model))
    carried = _states(carried_texts, model)
    feeds = _load_feeds(options, model)
    assert feeds is not None
    calibration = _load_calibration(options, model)
    split = split_calibration(feeds, calibration, limit=config.calibration_samples)
    finished = None if quantized is None else load_model(quantized)
    wanted = resolve(only, model) if only else None
    for note in (*model.notes, *feeds.notes, *(wanted.notes if wanted else ())):
        _say("warning", note)
    with _progress("measuring") as progress:
        shared: dict[str, Any] = {
            "cache": Workspace(default_root()).cache, "quantized": finished, "mask": mask,
            "states": carried, "folder": folder, "progress": progress,
        }  # fmt: skip
        given = (model, config, feeds, split, metric)
        path = None if expected is None else Path(expected)
        try:
            with trials_at(cluster, *given, **shared, expected=path, allow_code=True) as trials:
                table = measure_sensitivity(
                    trials,
                    model,
                    None if wanted is None else wanted.names,
                    by=by,
                    ways=ways or WAYS,
                    parts=parts or PARTS[:1],
                    coarse_samples=coarse or None,
                    progress=progress,
                    stop=lambda: budget is not None and time.monotonic() - begin > budget,
                )
        except UnplannableError as error:
            raise ModelError(
                f"nothing can be measured in {quantized or float_model}: {error}",
                hint="Name a file with Q/DQ pairs or integer operators, or leave out --quantized.",
            ) from error
    if json_file:
        data = table.to_json()
        _write(json_file, dump_json({**data, "float_model": float_model, "quantized": quantized}))
    if json_file != "-":
        for line in sensitivity_lines(table, top):
            _print(printable(line, LONGEST_WORD))
    for note in table.notes:
        _say("note", note)
    return INTERRUPTED if table.interrupted else 0


# ----------------------------------------------------------------------------------- search


def _trials_folder(states: Sequence[str]) -> tuple[Path | None, tuple[str, ...]]:
    """The folder that --state names for trials, and the carried states that it names.

    Raises:
        click.UsageError: more than one folder.
    """
    folders = [text for text in states if "=" not in text]
    if len(folders) > 1:
        raise click.UsageError("--state names more than one folder for trials")
    carried = tuple(text for text in states if "=" in text)
    if not folders:
        return None, carried
    folder = Path(folders[0])
    with suppress(OSError):  # whoever opens it says what is wrong
        folder.parent.mkdir(parents=True, exist_ok=True)
    return folder, carried


@cli.command()
@click.argument("float_model", metavar="FLOAT")
@click.option(
    "--target",
    default="output_sqnr_db=20",
    show_default=True,
    metavar="METRIC=VALUE",
    help="The goal: at least or at most that, as the metric has it, e.g. top1_drop=0.01.",
)
@click.option("-o", "--output", required=True, metavar="FILE", help="The exclusion list to write.")
@_FEEDS
@_CALIBRATION
@click.option(
    "--max-float-macs",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Leave at most this share (0..1) of the multiply-accumulates in float.",
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="End after so long with the best list so far.",
)
@click.option(
    "--simulated", is_flag=True, help="Judge with optimisations off; no file is made for it."
)
@click.option("--no-cures", is_flag=True, help="Do not try other recipes beside the list.")
@click.option("--expected", metavar="FILE", help="Expected values for the metric expected, as CSV.")
@_CLUSTER
@_RECIPE
@_RUNS
@_JSON
def search(
    float_model: str,
    target: str,
    output: str,
    max_float_macs: float | None,
    budget: float | None,
    simulated: bool,
    no_cures: bool,
    expected: str | None,
    cluster: str,
    mask: str,
    states: tuple[str, ...],
    provider: str,
    json_file: str | None,
    **options: Any,
) -> int:
    """Find the smallest list of nodes to leave in float that reaches a goal.

    Judged on feeds that did not calibrate and on the deployed model. With --state DIR trials are
    kept there, and a search that was stopped goes on where it was. Ctrl-C writes the best so far.
    """
    begin = time.monotonic()
    _need_feeds(options)
    from inspector.cluster import trials_at
    from inspector.exclusions import write_exclusions
    from inspector.feeds import split_calibration
    from inspector.model_files import load_model
    from inspector.real_files import RealFiles, cures_for, try_cures
    from inspector.render import LONGEST_WORD, dump_json, printable
    from inspector.search import find_exclusions
    from inspector.search_result import Goal, exclusion_list, search_lines
    from inspector.store import Workspace, default_root
    from inspector.task_metrics import split_target
    from inspector.trials import quantized_nodes

    read = [float_model, options["recipe"], options["preprocess"], expected]
    _keep_inputs(read, [output, json_file])
    metric, value = split_target(target)
    folder, carried_texts = _trials_folder(states)
    model = load_model(float_model)
    _need_float(model, float_model)
    config = _config(options, _base_recipe(options, [], model))
    carried = _states(carried_texts, model)
    feeds = _load_feeds(options, model)
    assert feeds is not None
    calibration = _load_calibration(options, model)
    split = split_calibration(feeds, calibration, limit=config.calibration_samples)
    seen = split.seen if config.static else (False,) * len(feeds)
    judged = [at for at, known in enumerate(seen) if not known]
    unseen = bool(judged)
    for note in dict.fromkeys((*model.notes, *feeds.notes)):
        _say("warning", note)
    if not unseen:
        judged = list(range(len(feeds)))
        _say("warning", "all feeds calibrate: the goal is judged on feeds that were seen")
    cache = Workspace(default_root()).cache
    with (
        _progress("searching") as progress,
        trials_at(
            cluster,
            model,
            config,
            feeds,
            split,
            metric,
            cache=cache,
            mask=mask,
            states=carried,
            folder=folder,
            beside=True,
            expected=None if expected is None else Path(expected),
            allow_code=True,
            progress=progress,
        ) as trials,
    ):
        goal = Goal.of(trials.metric, value)
        files = RealFiles(
            model,
            feeds,
            split,
            trials.metric,
            judged,
            cache=cache,
            optimized=not simulated,
            mask=mask,
            states=carried,
            provider=provider,
        )
        left = None if budget is None else max(budget - (time.monotonic() - begin), 0.0)
        result = find_exclusions(
            trials,
            goal,
            candidates=quantized_nodes(trials, model),
            accept=None if simulated else lambda names: files.figure(config, names),
            judged=judged,
            max_float_macs=max_float_macs,
            budget_seconds=left,
            progress=progress,
        )
        stopped = result.ended == "stopped"
        result = replace(result, unseen=unseen)
        if not no_cures and not stopped and (result.nodes or not result.reached):
            until = math.inf if budget is None else begin + budget
            cures = try_cures(
                files,
                goal,
                cures_for(config, result.worst_tensors),
                progress=progress,
                stop=lambda: time.monotonic() > until,
            )
            result = replace(result, cures=cures)
    write_exclusions(exclusion_list(result, model, config), Path(output))
    if json_file:
        _write(json_file, dump_json(result.to_json()))
    if json_file != "-":
        for line in search_lines(result, model):
            _print(printable(line, LONGEST_WORD))
        words = ["quant-inspector", "quantize", float_model, "--exclude", output]
        words += ["-o", f"{Path(float_model).stem}.{config.weight_type}.onnx"]
        for name in ("inputs", "calibration"):
            words += [f"--{name}", options[name]] if options[name] else []
        _print(printable(f"wrote {output}", LONGEST_WORD))
        _print(printable(shlex.join([*words, *_feed_words(options)]), LONGEST_WORD))
    for note in result.notes:
        _say("note", note)
    if result.reached and not result.nodes and goal.metric.startswith("output_sqnr_db"):
        _say("note", "a pooled figure can hide a silent part of an output: diagnose names it")
    if stopped:
        return INTERRUPTED
    return 0 if result.reached else FAILED_GATE


# ------------------------------------------------------------------------------------ graph


@cli.command()
@click.argument("float_model", metavar="FLOAT")
@click.argument("quantized_model", metavar="QUANTIZED")
@_FEEDS
@click.option(
    "--by",
    type=click.Choice(["accumulated", "local", "isolated", "added", "saturated", "seconds"]),
    default="accumulated",
    show_default=True,
    help="What nodes are ranked by; isolated and added take a second pass.",
)
@click.option("--upstream", metavar="NODE", help="Name the node that explains this one's error.")
@_RUNS
@_JSON
@_TOP
@click.option("--skeletons", metavar="FOLDER", help="Write both graphs without weights.")
def graph(
    float_model: str,
    quantized_model: str,
    by: str,
    upstream: str | None,
    mask: str,
    states: tuple[str, ...],
    provider: str,
    json_file: str | None,
    top: int,
    skeletons: str | None,
    **options: Any,
) -> None:
    """Which node is which in both models, and the error of every node, worst first."""
    _need_feeds(options)
    from inspector import node_figures
    from inspector.compare import compare_models, feed_for_quantized
    from inspector.equalize import comparable_float
    from inspector.matching import match_tensors
    from inspector.model_files import load_model, write_proto
    from inspector.node_links import link_nodes
    from inspector.publishing import unfinished_file
    from inspector.render import dump_json, printable
    from inspector.skeleton import skeleton_of
    from inspector.timing import profile_nodes, seconds_by_tensor

    targets = [f"{skeletons}/{side}.onnx" for side in ("float", "quantized")] if skeletons else []
    _keep_inputs([float_model, quantized_model], [json_file, *targets])
    reference, quantized = load_model(float_model), load_model(quantized_model)
    carried = _states(states, reference)
    feeds = _load_feeds(options, reference)
    assert feeds is not None
    matching = match_tensors(comparable_float(reference, quantized), quantized)
    links = link_nodes(reference, quantized, matching).to_json()
    if upstream is not None:
        names = {**links["float"], **links["quantized"]}
        _known("--upstream", upstream, names, "node of either model")
    with _progress("comparing") as progress:
        comparison = compare_models(
            reference,
            quantized,
            feeds,
            mask=mask,
            states=carried,
            provider=provider,
            isolated=by in ("isolated", "added"),
            measure_latency=False,
            progress=progress,
        )
    profile = None
    if by == "seconds":
        given = {"float": feeds[0], "quantized": feed_for_quantized(matching, feeds[0])}
        profile = {}
        for side, model in (("float", reference), ("quantized", quantized)):
            times = profile_nodes(model, given[side], optimized=False)
            found_times = {"times": times.to_json(), "tensors": seconds_by_tensor(model, times)}
            profile[side] = {"simulated": found_times}
    sheet = node_figures.sheet(comparison, links, profile=profile)
    if targets:
        Path(str(skeletons)).mkdir(parents=True, exist_ok=True)
        for target, model in zip(targets, (reference, quantized), strict=True):
            with unfinished_file(Path(target)) as part:
                write_proto(skeleton_of(model), part)
    found = {}
    if upstream is not None:
        found = {"upstream": node_figures.upstream(comparison, links, upstream)}
    if json_file:
        head = {"format": "quant-inspector/graph", "version": 1}
        _write(json_file, dump_json({**head, **sheet, **found}))
    if json_file != "-":
        for line in node_figures.nodes_text(sheet, by, top):
            _print(printable(line))
        if upstream is not None:
            text = found["upstream"] or "no node with a figure"
            how = (
                "" if by in ("isolated", "added") else ", where SQNR falls most (--by added: sure)"
            )
            _print(printable(f"the error of {upstream} comes from {text}{how}"))
    for warning in comparison.warnings:
        _say("warning", warning)


# ----------------------------------------------------------------------------------- backup


@cli.command()
@click.argument("data", metavar="DATA")
@click.option("-o", "--output", required=True, metavar="FILE", help="The .tar.gz file to write.")
def backup(data: str, output: str) -> None:
    """Write everything in a data folder to one file; the server may run meanwhile."""
    from inspector.backup import back_up

    with _progress("backing up") as progress:
        made = back_up(Path(data), Path(output), progress=progress)
    _print_backup(f"wrote {output}", made)


@cli.command()
@click.argument("archive", metavar="FILE")
@click.argument("data", metavar="DATA")
def restore(archive: str, data: str) -> None:
    """Put a backup into an empty folder, and check its models and its index."""
    from inspector import backup

    with _progress("restoring") as progress:
        found = backup.restore(Path(archive), Path(data), progress=progress)
    _print_backup(f"restored {data} as of {found.created}", found)


def _print_backup(done: str, found: Backup) -> None:
    from inspector.render import LONGEST_WORD, format_bytes, printable

    held = f"{found.users} workspaces, {found.runs} runs, {found.files} files"
    _print(printable(f"{done}: {held}, {format_bytes(found.size_bytes)}", LONGEST_WORD))
    if found.left_out:
        _say("note", f"{found.left_out} files were deleted meanwhile and are not in it")


# ------------------------------------------------------------------------------------- main


def _guarded_command() -> int:
    """The process's own command, which does not outlive the process that waits for it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    return main(sys.argv[1:])


def _say_of_command(kind: str, text: str) -> None:
    """One line about a command that could not speak for itself any more."""
    which = f"quant-inspector {' '.join(sys.argv[1:])}: " if kind == "error" else ""
    _say(kind, f"{which}{text}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of a command line; the process's own, guarded, where none is given."""
    if arguments is None:
        return guarded(_guarded_command, _say_of_command)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show "–" gets "?" instead of a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = cli.main(
            args=list(arguments),
            prog_name="quant-inspector",
            standalone_mode=False,
        )
    except click.ClickException as error:
        _say("error", error.format_message())
        context = getattr(error, "ctx", None)
        command = "quant-inspector" if context is None else context.command_path
        general = f"Run `{command} --help` for what it takes."
        _say("hint", error.hint if isinstance(error, _WrongName) else general)
        return USER_ERROR
    except InspectorError as error:
        _say("error", error.message)
        _say("hint", error.hint)
        return USER_ERROR
    except (click.Abort, KeyboardInterrupt, Cancelled):
        _say("error", "stopped")
        return INTERRUPTED
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
