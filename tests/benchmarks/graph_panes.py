"""Seconds until graph panes are drawn, and until they are painted anew, by the number of nodes.

Both panes of a page show a generated graph of branches that part and meet again; the browser says
when each is drawn and how long a repaint took. The panes share the machine, as a user's do.

python -m tests.benchmarks.graph_panes
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import onnx
from onnx import TensorProto, helper
from playwright.sync_api import Page

from tests.benchmarks.harness import Figure
from tests.browser import chromium
from tests.graph_page import SIDES, running_graph_app, write_look, write_pair

NAME = "graph_panes"
SIZES = (300, 1_000, 2_000)
# Of 2,000 nodes per pane, on 2 cores; a repaint is to feel immediate.
REQUIRED_SECONDS = 5.0
REQUIRED_REPAINT_SECONDS = 0.1
ROUNDS = 3


def network(nodes: int) -> onnx.ModelProto:
    """A graph of blocks: one node, two branches of three and two nodes, an addition."""
    made: list[onnx.NodeProto] = []

    def add(op_type: str, *inputs: str) -> str:
        name = f"{op_type}_{len(made)}"
        made.append(helper.make_node(op_type, list(inputs), [f"t_{name}"], name=name))
        return f"t_{name}"

    last = "x"
    while len(made) + 7 <= nodes:
        begin = add("Relu", last)
        left = add("Tanh", add("Neg", add("Sigmoid", begin)))
        right = add("Exp", add("Abs", begin))
        last = add("Add", left, right)
    while len(made) < nodes:
        last = add("Relu", last)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        made,
        "g",
        [value("x", TensorProto.FLOAT, [1, 8])],
        [value(last, TensorProto.FLOAT, [1, 8])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def seconds(page: Page, what: str) -> float:
    """What the slower pane says of its last drawing, or painting."""
    panes = page.locator(".pane")
    values = [panes.nth(at).get_attribute(f"data-{what}") for at in range(len(SIDES))]
    return max(float(value or "nan") for value in values) / 1000


def wait_for_panes(page: Page) -> None:
    for side in SIDES:
        page.locator(f".pane.{side}[data-painted] .cover.gone").wait_for(
            state="attached", timeout=120_000
        )


def measure(*, quick: bool) -> list[Figure]:
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as name, running_graph_app(Path(name)) as address:
        root = Path(name)
        for size in SIZES[:1] if quick else SIZES:
            model = network(size)
            assert len(model.graph.node) == size
            write_pair(root / str(size), model, model)
            whole, panes, paints = [], [], []
            with chromium() as browser:
                for at in range(1 + (1 if quick else ROUNDS)):
                    context = browser.new_context(viewport={"width": 1280, "height": 800})
                    page = context.new_page()
                    begin = time.perf_counter()
                    page.goto(f"{address}/?pair={size}")
                    wait_for_panes(page)
                    took = time.perf_counter() - begin
                    drawn = seconds(page, "drawn")
                    # Another measure: every node gets another colour.
                    write_look(root / str(size), measure="saturated")
                    page.get_by_role("button", name="Rerun").click()
                    page.locator(".legend .title", has_text="Saturated").wait_for()
                    page.wait_for_timeout(500)
                    painted = seconds(page, "painted")
                    write_look(root / str(size))
                    if at:  # the first one warms the server's file cache
                        whole.append(took)
                        panes.append(drawn)
                        paints.append(painted)
                    context.close()
            subject = f"{size:,} nodes per pane"
            found += [
                Figure(
                    benchmark=NAME, subject=subject, what="the slower pane, from fetch to drawing",
                    measured=statistics.median(panes), unit="s", required=REQUIRED_SECONDS,
                    note=", ".join(f"{s:.2f}" for s in panes),
                ),
                Figure(
                    benchmark=NAME, subject=subject, what="address opened to both panes coloured",
                    measured=statistics.median(whole), unit="s",
                    note=", ".join(f"{s:.2f}" for s in whole),
                ),
                Figure(
                    benchmark=NAME, subject=subject, what="every node painted anew",
                    measured=statistics.median(paints), unit="s",
                    required=REQUIRED_REPAINT_SECONDS,
                    note=", ".join(f"{s:.3f}" for s in paints),
                ),
            ]  # fmt: skip
    return found


def main() -> None:
    for figure in measure(quick=False):
        print(f"{figure.subject}: {figure.what}: {figure.measured:.3f} s ({figure.note})")


if __name__ == "__main__":
    main()
