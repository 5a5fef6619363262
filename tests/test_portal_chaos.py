"""A portal whose processes are killed and whose disk is filled in the middle of its work.

Six rounds here; `python -m tests.portal_chaos` does fifty and prints what came of each.
QUANT_INSPECTOR_CHAOS=N does more of them here, QUANT_INSPECTOR_CHAOS_SEED=N others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import portal_chaos
from tests.portal_chaos import NoSmallDisk, Struck

pytestmark = pytest.mark.slow
ROUNDS = int(os.environ.get("QUANT_INSPECTOR_CHAOS", "6"))
SEED = int(os.environ.get("QUANT_INSPECTOR_CHAOS_SEED", "7"))


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Struck]:
    try:
        with portal_chaos.small_disk(tmp_path_factory.mktemp("probe")):
            small = True
    except NoSmallDisk:
        small = False
    with portal_chaos.struck_portal(tmp_path_factory.mktemp("chaos"), SEED, small=small) as found:
        yield found


@pytest.mark.parametrize(("victim", "moment"), portal_chaos.order(ROUNDS, SEED))
def test_whatever_is_struck_nothing_confirmed_is_lost_and_the_user_goes_on(
    struck: Struck, victim: str, moment: str
) -> None:
    if victim == "disk" and not struck.can_fill:
        pytest.skip("a disk that can be full needs a mount namespace, and that the rights of root")
    found = struck.round(victim, moment)
    assert found.faults == [], found


def _run_file(struck: Struck, name: str) -> Path:
    return struck.workspace.run_folder(next(iter(struck.confirmed.runs))) / name


def _draft(struck: Struck) -> Path:
    return struck.workspace.root / "pairs" / next(iter(struck.confirmed.drafts)) / "draft.json"


@pytest.mark.parametrize(
    ("place", "content", "said"),
    [
        (lambda s: _run_file(s, "run.json"), b'{"id": "', "unreadable"),
        (lambda s: _run_file(s, "comparison.json"), b"{}", "has changed"),
        (_draft, b'{"nodes": ["another"]}', "ticked are"),
        (lambda s: s.workspace.root / "temporary" / "half.onnx", b"", "is left in temporary/"),
        (lambda s: next((s.data / "blobs").iterdir()), b"other bytes", "holds something else"),
        (lambda s: s.data / "index.sqlite", b"SQLite format 3\0" + b"x" * 5000, "index: "),
    ],
)
def test_damage_is_found(
    struck: Struck, place: Callable[[Struck], Path], content: bytes, said: str
) -> None:
    path = place(struck)
    before = path.read_bytes() if path.exists() else None
    if not struck.confirmed.drafts:
        pytest.skip("nothing was ticked in these rounds")
    drafts = dict(struck.confirmed.drafts)
    # Into the file itself: it is a damaged disk that this stands for.
    path.write_bytes(content)
    try:
        assert any(said in each for each in struck.faults(restarted=False)), said
    finally:
        struck.confirmed.drafts = drafts
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)
    assert struck.faults(restarted=False) == []
