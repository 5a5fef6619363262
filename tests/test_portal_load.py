"""The load test of the portal, shortened: people at work together, each sees their own alone.

Nothing is judged by the clock here; `python -m tests.portal_load` measures.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests import portal_load
from tests.hosted import ADA, BOB, Portal, watermark
from tests.portal_load import Load, Person, complaints

PEOPLE = 5


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Load:
    data = tmp_path_factory.mktemp("load") / "data"
    data.mkdir()
    return portal_load.load(data, people=PEOPLE, seconds=8, seed=3, alone_seconds=2)


@pytest.mark.slow
def test_people_at_work_together_see_no_error_and_nothing_of_each_other(found: Load) -> None:
    assert found.errors() == []
    for diary in found.people:
        assert diary.pages > 10
        assert diary.runs, "their own pair was compared"
    assert all(diary.runs for diary in found.heavy), "the long jobs were started"


@pytest.mark.slow
def test_the_table_says_what_was_measured(found: Load) -> None:
    rows = {each.what: each for each in portal_load.figures_of(found)}
    assert rows["errors, strangers' watermarks among them"].measured == 0
    assert rows["memory of the web process, most"].met
    assert rows["loaded / alone, medians"].measured is not None


def test_a_strangers_watermark_is_an_error_and_so_is_a_page_without_ones_own(
    tmp_path: Path,
) -> None:
    person = Person(Portal(address="", data=tmp_path), ADA, seed=0)
    person._see(f"… {watermark(ADA)} …".encode())
    assert person.diary.errors == []
    person._see(f"… {watermark(ADA)} {watermark(BOB)} …".encode())
    assert watermark(BOB) in person.diary.errors[0]


def test_an_error_in_the_servers_log_is_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("2026-01-01 INFO started\nTraceback (most recent call last):\nKeyError: 1\n")
    assert complaints(log) == ["log: KeyError: 1"]


def test_a_copy_of_a_pair_carries_the_mark_in_all_names(tmp_path: Path) -> None:
    source = portal_load.light_sources()[0]
    float_model, _, _ = portal_load.own_pair(source, watermark(ADA), tmp_path / "own")
    proto = onnx.load(float_model)
    inputs = {each.name for each in proto.graph.input}
    for node in proto.graph.node:
        names = {node.name, *node.input, *node.output} - inputs - {""}
        assert all(each.startswith(watermark(ADA)) for each in names)
