"""Distributions against the values they stand for."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from inspector.distribution import Distribution, distribution_of_detail
from inspector.grid_schemes import SCHEMES
from inspector.lab import trial
from tests.test_lab import values


def test_few_values_are_kept_as_they_are() -> None:
    x = values("normal", 4000)
    known = Distribution.of(x)
    assert known.counts.sum() == 0
    for scheme in SCHEMES.values():
        exact, binned = trial(x, scheme, -1, 2), trial(known, scheme, -1, 2)
        assert binned.sqnr_db == pytest.approx(exact.sqnr_db, abs=1e-9)
        assert binned.clipped_fraction == pytest.approx(exact.clipped_fraction, abs=1e-12)


def test_parts_merge_to_what_the_whole_gives() -> None:
    x = values("relu6", 9000)
    edges = np.linspace(-0.5, 6.5, 257)
    whole = Distribution.of(x, edges=edges, atoms=(0.0, 6.0))
    merged = Distribution.of(x[:1000], edges=edges, atoms=(0.0, 6.0))
    for part in (x[1000:5000], x[5000:], np.array([np.nan])):
        merged = merged.merge(Distribution.of(part, edges=edges, atoms=(0.0, 6.0)))
    np.testing.assert_array_equal(merged.counts, whole.counts)
    np.testing.assert_array_equal(merged.atom_counts, [(x == 0).sum(), (x == 6).sum()])
    assert (merged.low, merged.high, merged.nonfinite) == (0.0, 6.0, 1)
    with pytest.raises(ValueError, match="do not merge"):
        merged.merge(Distribution.of(x))
    outside = Distribution.of(np.array([-9.0, 9.0, 1.0]), edges=edges, atoms=())
    assert outside.counts[[0, -1]].tolist() == [1, 1]
    assert outside.count == 3


def test_values_that_stream_into_even_bins_are_tried_as_if_they_were_together() -> None:
    x = values("relu6")
    known = Distribution.over(0.0, 6.0)
    assert (known.count, known.atoms.tolist()) == (0, [0, 6])
    for part in np.array_split(x, 7):
        known = known.with_values(part)
    again = distribution_of_detail({"distribution": json.loads(json.dumps(known.to_json()))})
    for name in ("ort-uint8", "ort-int4-symmetric", "mid-rise", "truncating"):
        exact = trial(x, SCHEMES[name], 0, 4.5)
        for each in (known, again):
            assert trial(each, SCHEMES[name], 0, 4.5).sqnr_db == pytest.approx(
                exact.sqnr_db, abs=0.05
            )
    for low, high in ((0.0, 0.0), (1.0, float(np.nextafter(1, 2))), (-1e-310, 1e-310)):
        flat = Distribution.over(low, high).with_values(np.array([low, high]))
        assert flat.count == 2
        assert trial(flat, SCHEMES["ort-uint8"], low, high).sqnr_db > 40
    assert math.isnan(Distribution.from_json(Distribution.over(0, 1).to_json()).low)
    with pytest.raises(ValueError, match="not a range"):
        Distribution.over(1, 0)


def test_a_detail_of_the_workbench_is_read_with_what_lies_outside_its_bins() -> None:
    detail = {
        "edges": [-1.0, 0.0, 1.0], "float_counts": [4, 6], "float_below": 1, "float_above": 2,
        "nonfinite": 3, "float_atoms": [[0.0, 5], [7.0, 1]],
    }  # fmt: skip
    known = distribution_of_detail(detail)
    assert known.counts.tolist() == [4, 1]
    assert dict(zip(known.atoms, known.atom_counts, strict=True)) == {-1.0: 1, 0.0: 5, 1.0: 2}
    assert (known.count, known.nonfinite, known.low, known.high) == (13, 3, -1, 1)
    for bare in ({}, {"edges": [], "float_counts": []}, {"edges": [0, 1], "float_counts": []}):
        assert distribution_of_detail(bare).count == 0
        assert trial(distribution_of_detail(bare), SCHEMES["ort-int8"], 0, 1).sqnr_db == math.inf
    flat = {"edges": [0.5, 0.5], "float_counts": [9]}
    assert trial(distribution_of_detail(flat), SCHEMES["ort-int8"], 0, 0.5).sqnr_db > 100
