"""A small app around the graph panes for the browser tests: pairs on disk, events in a file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, helper

from inspector.error_scale import ERROR_COLORS, ERROR_STEPS, NO_FIGURE_COLOR, readable_text
from inspector.model_files import load_model
from inspector.skeleton import skeleton_of
from tests.browser import served
from tests.samples import ROOT

SIDES = ("float", "quantized")
HELPERS = ("QuantizeLinear", "DequantizeLinear")
HOSTILE = "<img src=x onerror=alert(1)>"
QUOTED = "a\"b'c\\d]{}</title><script>window.hacked = 1</script>\N{SNOWMAN}"
IN_BODY = "inner of the body"
MEASURES = [
    {
        "key": key,
        "label": label,
        "unit": unit,
        "better": better,
        "steps": list(steps),
        "colors": list(ERROR_COLORS),
        "texts": [readable_text(color) for color in ERROR_COLORS],
    }
    for key, label, unit, better, steps in (
        ("accumulated", "Accumulated error", "dB", "higher", ERROR_STEPS),
        ("saturated", "Saturated share", "share", "lower", (0.0001, 0.001, 0.01, 0.1)),
    )
]

# Runs in the server. What the browser said is written down; what to show is read at each rerun.
_SCRIPT = """
import json
import time
from pathlib import Path

import streamlit as st

from inspector.web import routes
from inspector.web.graph_panes import graph_panes

st.set_page_config(layout="wide")
ROOT = Path(__file__).parent


def graph():
    folder = ROOT / st.query_params.get("pair", "small")
    look = json.loads((folder / "look.json").read_text())
    sheet = (folder / "sheet.json").read_bytes()
    urls = {
        side: routes.offer(folder / f"{side}.onnx", "application/octet-stream", "test")
        for side in ("float", "quantized")
    }
    urls["sheet"] = routes.offer(sheet, "application/json", "test")
    urls["pane"] = routes.pane_address()
    urls.update(look.pop("urls", {}))
    keep = look.pop("keep", False)
    picture = routes.accept("test", folder / "kept.svg", 5_000_000) if keep else ""
    height = look.pop("height", 520)
    data = {"urls": urls, "picture": picture, **look}
    result = graph_panes(data, key="graph", height=height)
    with (folder / "events.jsonl").open("a") as file:
        for name in ("selected", "toggled", "key", "failed"):
            value = getattr(result, name)
            if value is not None:
                file.write(json.dumps({name: value}) + "\\n")
    st.button("Rerun")


def other():
    st.write("The other page")


st.navigation([st.Page(graph, title="Graph", default=True), st.Page(other, title="Other")]).run()
"""
_APP = """
import streamlit as st
from inspector.web import routes

app = st.App("page.py", routes=routes.served())
"""
LOOK: Mapping[str, Any] = {
    "measure": "accumulated",
    "threshold": None,
    "selected": None,
    "excluded": [],
    "changed": {},
    "theme": "light",
}


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those in bodies after the one they belong to."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


def figure(number: int) -> float | str | None:
    """A figure in dB that depends on the node's place alone; every kind comes up."""
    special: dict[int, float | str | None] = {3: "Infinity", 5: "NaN", 7: None, 9: "-Infinity"}
    return special.get(number % 13, float((number * 7) % 50))


def sheet_of(float_graph: onnx.GraphProto, quantized_graph: onnx.GraphProto) -> dict[str, Any]:
    """Figures for every node; partners are nodes of the same name, of a Q or DQ what it serves."""
    float_nodes = list(nodes_of(float_graph))
    names = {node.name for node in float_nodes}
    producers = {tensor: node.name for node in float_nodes for tensor in node.output}
    partners: dict[str, list[str]] = {node.name: [] for node in float_nodes}
    sides: dict[str, dict[str, Any]] = {"float": {}, "quantized": {}}
    for number, node in enumerate(nodes_of(quantized_graph)):
        mine: list[str] = []
        if node.name in names:
            mine = [node.name]
        elif node.op_type in HELPERS:
            stem = node.input[0]
            for ending in ("_QuantizeLinear_Output", "_QuantizeLinear_Input"):
                stem = stem.removesuffix(ending)
            mine = [producers[stem]] if stem in producers else []
        for each in mine:
            # The node itself before what serves it.
            place = 0 if node.name == each else len(partners[each])
            partners[each].insert(place, node.name)
        sides["quantized"][node.name] = _about(node, number, mine)
    for number, node in enumerate(float_nodes):
        sides["float"][node.name] = _about(node, number, partners[node.name])
    return {"measures": MEASURES, "no_figure": NO_FIGURE_COLOR, "sides": sides}


def _about(node: onnx.NodeProto, number: int, partners: Sequence[str]) -> dict[str, Any]:
    value = figure(number)
    marks = [] if partners else ["unmatched"]
    if number % 17 == 2:
        marks.append("float again")
    if number % 17 == 4:
        marks.append("still wrapped")
    return {
        "op": node.op_type,
        "partners": list(partners),
        "figures": {} if value is None else {"accumulated": value, "saturated": number / 500},
        "marks": marks,
        "tip": f"{node.op_type}\naccumulated {value} dB",
    }


def write_pair(
    folder: Path, float_model: onnx.ModelProto, quantized_model: onnx.ModelProto
) -> dict[str, Any]:
    """Puts a pair of skeletons with figures where the app looks; gives the sheet."""
    folder.mkdir(parents=True)
    for side, model in zip(SIDES, (float_model, quantized_model), strict=True):
        onnx.save(model, folder / f"{side}.onnx")
    sheet = sheet_of(float_model.graph, quantized_model.graph)
    (folder / "sheet.json").write_text(json.dumps(sheet))
    write_look(folder)
    return sheet


def write_real(folder: Path, source: Path) -> dict[str, Any]:
    """The same of a real model and its quantized twin."""
    models = [
        skeleton_of(load_model(source / name)) for name in ("model.onnx", "ort_static_qdq.onnx")
    ]
    return write_pair(folder, *models)


def write_look(folder: Path, **changes: Any) -> None:
    (folder / "look.json").write_text(json.dumps({**LOOK, **changes}))


def events(folder: Path, name: str) -> list[Any]:
    """What the browser reported of one kind, oldest first, repeated with every rerun."""
    path = folder / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line[name] for line in map(json.loads, lines) if name in line]


def small_pair() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A chain with hostile names and an If, and its twin with Q and DQ."""

    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8])

    def branch(name: str, op_type: str, inner: str) -> onnx.GraphProto:
        made = [
            helper.make_node(op_type, ["t2"], [f"{name}_o"], name=inner),
            helper.make_node("Neg", [f"{name}_o"], [f"{name}_p"], name=f"{inner} 2"),
        ]
        return helper.make_graph(made, name, [], [value(f"{name}_p")])

    def chosen(source: str) -> onnx.NodeProto:
        return helper.make_node(
            "If", ["flag"], [source], name="choose",
            then_branch=branch("then", "Relu", IN_BODY),
            else_branch=branch("else", "Abs", "inner else"),
        )  # fmt: skip

    def model(nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
        scale = helper.make_tensor("s", TensorProto.FLOAT, [], [0.1])
        zero = helper.make_tensor("z", TensorProto.INT8, [], [0])
        flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
        graph = helper.make_graph(
            nodes, "g", [value("x"), flag], [value("y"), value("w")], [scale, zero]
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)

    names = ["first", HOSTILE, QUOTED, "fourth", "fifth"]
    float_nodes, quantized_nodes = [], []
    for number, name in enumerate(names):
        begin, end = ("x" if number == 0 else f"t{number}"), f"t{number + 1}"
        float_nodes.append(helper.make_node("Sigmoid", [begin], [end], name=name))
        read = begin
        if number:
            read = f"{begin}_dq"
            # One that serves no tensor by its name.
            middle = "odd" if number == 3 else f"{begin}_QuantizeLinear_Output"
            quantized_nodes += [
                helper.make_node("QuantizeLinear", [begin, "s", "z"], [middle], name=f"{begin}_Q"),
                helper.make_node(
                    "DequantizeLinear", [middle, "s", "z"], [read], name=f"{begin}_DQ"
                ),
            ]
        quantized_nodes.append(helper.make_node("Sigmoid", [read], [end], name=name))
    for nodes in (float_nodes, quantized_nodes):
        nodes += [chosen("c"), helper.make_node("Neg", ["t5"], ["y"], name="last")]
        nodes.append(helper.make_node("Exp", ["c"], ["w"], name="after"))
    return model(float_nodes), model(quantized_nodes)


@contextlib.contextmanager
def running_graph_app(root: Path) -> Iterator[str]:
    """The address of an app that shows the pairs in the folder, as `?pair=<name of its folder>`."""
    (root / "page.py").write_text(_SCRIPT)
    (root / "app.py").write_text(_APP)
    options = (
        *("--server.address", "127.0.0.1", "--browser.gatherUsageStats", "false"),
        *("--client.toolbarMode", "minimal"),
    )
    with served(root, {"PYTHONPATH": str(ROOT)}, *options) as address:
        yield address
