"""The noise of lists, learnt from lists: truth is planted, and every list of a size is tried."""

from __future__ import annotations

import itertools
from collections.abc import Collection

import numpy as np
import pytest

from inspector.noise_model import MOST_NOISE, NoiseModel
from tests.samples import rng

# A chain of nodes that share the tensors between them, with a weight each.
TENSORS = {f"n{at}": {f"t{at}", f"t{at + 1}", f"w{at}"} for at in range(9)}
NODES = frozenset(TENSORS)
MACS = {name: (at + 1) / 45 for at, name in enumerate(TENSORS)}


class Truth:
    """Noise that adds up over tensors, as planted."""

    def __init__(self, seed: int) -> None:
        names = sorted(set().union(*TENSORS.values()))
        values = rng(seed).lognormal(-5, 1.5, len(names))
        self.noise = dict(zip(names, values, strict=True))

    def of(self, exclude: Collection[str]) -> float:
        wanted = set().union(*(t for n, t in TENSORS.items() if n not in exclude))
        return float(sum(self.noise[t] for t in wanted))

    def best(self, count: int, most_macs: float = 1.0) -> float:
        lists = map(frozenset, itertools.combinations(TENSORS, count))
        return min(self.of(x) for x in lists if sum(MACS[n] for n in x) <= most_macs + 1e-12)

    def model(self, lists: int) -> NoiseModel:
        """A model that was shown each node alone and so many lists."""
        found = NoiseModel(TENSORS, MACS)
        found.rank({n: self.of(NODES - {n}) for n in TENSORS})
        random = rng(lists)
        for _ in range(lists):
            some = frozenset(n for n in TENSORS if random.random() < 0.5)
            found.learn(some, self.of(some))
        found.settle(self.of(()) / 10)
        return found


def test_a_ranking_alone_gives_every_node_its_noise_back() -> None:
    truth = Truth(0)
    found = truth.model(0)
    for name in TENSORS:
        alone = NODES - {name}
        assert found.noise_of(alone) == pytest.approx(truth.of(alone), rel=0.05)
    assert found.noise_of(NODES) == 0.0


def test_what_was_measured_is_expected_again() -> None:
    truth = Truth(1)
    found = truth.model(0)
    for some in (frozenset(), frozenset(["n2", "n3"]), frozenset(["n0", "n5", "n6", "n7"])):
        before = abs(found.noise_of(some) / truth.of(some) - 1)
        found.learn(some, truth.of(some))
        found.settle(truth.of(some))
        assert abs(found.noise_of(some) / truth.of(some) - 1) < max(0.03, before / 5)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("seed", range(4))
def test_with_enough_lists_the_best_of_a_size_is_proposed(count: int, seed: int) -> None:
    truth = Truth(seed)
    found = truth.model(80).propose(count)
    assert found is not None
    assert len(found) == count
    assert truth.of(found) <= 1.05 * truth.best(count)


@pytest.mark.parametrize("most", [0.1, 0.3, 0.5])
def test_a_proposal_keeps_to_the_price(most: float) -> None:
    truth = Truth(2)
    found = truth.model(80).propose(3, most_macs=most)
    if most < MACS["n0"] + MACS["n1"] + MACS["n2"] - 1e-9:
        assert found is None
        return
    assert found is not None
    assert sum(MACS[n] for n in found) <= most + 1e-12
    assert truth.of(found) <= 2 * truth.best(3, most)


def test_nodes_that_only_help_together_are_proposed_together() -> None:
    tensors = {"a": {"x", "between"}, "b": {"between", "y"}, "c": {"y", "z"}, "d": {"z", "w"}}
    noise = {"x": 0.01, "between": 1.0, "y": 0.01, "z": 0.02, "w": 0.02}
    found = NoiseModel(tensors, {})
    found.rank({n: sum(noise[t] for t in each) for n, each in tensors.items()})
    assert found.propose(2) == {"a", "b"}


def test_a_list_that_was_tried_is_not_proposed_again() -> None:
    model = Truth(3).model(20)
    tried: set[frozenset[str]] = set()
    for _ in range(9):
        found = model.propose(1, tried=tried)
        if found is None:
            break
        assert found not in tried
        tried.add(found)
    assert len(tried) >= 5


def test_proposals_are_the_same_each_time() -> None:
    tensors = {f"n{at}": {f"t{at}", f"t{at + 1}", f"w{at}"} for at in range(60)}

    def proposals() -> list[frozenset[str] | None]:
        model = NoiseModel(tensors, {})
        model.rank({n: float(v) for n, v in zip(tensors, rng(6).lognormal(size=60), strict=True)})
        # So few changes that the outcome depends on which ones.
        return [model.propose(size, rounds=4) for size in range(5, 55, 5)]

    assert proposals() == proposals()


def test_all_and_none_are_sizes_too() -> None:
    model = Truth(5).model(3)
    assert model.propose(0) == frozenset()
    assert model.propose(9) == NODES
    assert model.propose(10) is None


def test_noise_without_end_is_held_to_a_limit() -> None:
    model = NoiseModel(TENSORS, MACS)
    model.rank(dict.fromkeys(TENSORS, np.inf))
    model.learn((), np.inf)
    model.settle(0.01)
    assert 0 <= model.noise_of(()) <= len(TENSORS) * MOST_NOISE
    assert model.propose(4) is not None


def test_a_model_of_nodes_without_noise_proposes_all_the_same() -> None:
    model = NoiseModel(TENSORS, {})
    model.rank(dict.fromkeys(TENSORS, 0.0))
    model.learn(frozenset(["n1"]), 0.0)
    model.settle(0.0)
    assert model.noise_of(()) == 0.0
    found = model.propose(2)
    assert found is not None
    assert len(found) == 2
