"""What noise any exclusion list is likely to leave, learnt from the lists that were measured.

Noise that quantized tensors add at the outputs is taken to add up (independent errors do), and a
tensor is quantized as long as one node that wants it is. So nodes that only help together, because
they want the same tensors, are seen together, and thousands of lists are weighed for the one that
is then measured. Errors that cancel or overflow make this wrong in places; each measurement puts
it right where it was taken. It proposes: what a list really gives is for `search` to measure.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# Noise is relative to the signal; beyond this outputs are rubbish and more of it tells nothing.
MOST_NOISE = 1e3
# Rounds of the fit to the ranking, and of the local search behind a proposal.
_FIT_ROUNDS = 200
_SEARCH_ROUNDS = 100
# How far a tensor's noise may be from the fit's, and a measured list's from the sum.
_DOUBT = 1.0
_EXACT = 0.01
_ELSEWHERE = 0.1
# So many of the measurements nearest to the target are learnt from.
_MOST_LEARNT = 400
# Weights of the price against noise, in units of their totals.
_PRICES = (0.0, *(8.0**k for k in range(-3, 2)))


@dataclass(slots=True)
class _Choice:
    """Which nodes are quantized, with what follows from it kept up to date.

    Attributes:
        quantized: bool per node.
        wanted: per tensor, how many quantized nodes want it.
        gain: per node, the noise of its tensors that no quantized node wants.
        noise: of all tensors that are wanted.
    """

    quantized: NDArray[np.bool_]
    wanted: NDArray[np.int64]
    gain: NDArray[np.float64]
    noise: float

    def copy(self) -> _Choice:
        return _Choice(self.quantized.copy(), self.wanted.copy(), self.gain.copy(), self.noise)


@dataclass(slots=True)
class NoiseModel:
    """Noise per tensor, from measured lists.

    Attributes:
        tensors: by node, in graph order, what is quantized when it alone is.
        float_macs: by node, the share of the multiply-accumulates that it computes.
    """

    tensors: Mapping[str, Collection[str]]
    float_macs: Mapping[str, float]
    _nodes: tuple[str, ...] = ()
    _names: tuple[str, ...] = ()
    _of_node: list[NDArray[np.int64]] = field(default_factory=list)
    _of_tensor: list[NDArray[np.int64]] = field(default_factory=list)
    _macs: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _prior: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _noise: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _measured: dict[frozenset[str], float] = field(default_factory=dict)
    _rows: dict[frozenset[str], NDArray[np.bool_]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._nodes = tuple(self.tensors)
        self._names = tuple(
            dict.fromkeys(t for each in self.tensors.values() for t in sorted(each))
        )
        place = {name: at for at, name in enumerate(self._names)}
        self._of_node = [
            np.array(sorted(place[t] for t in self.tensors[n]), np.int64) for n in self._nodes
        ]
        readers: list[list[int]] = [[] for _ in self._names]
        for at, wanted in enumerate(self._of_node):
            for tensor in wanted:
                readers[tensor].append(at)
        self._of_tensor = [np.array(each, np.int64) for each in readers]
        self._macs = np.array([self.float_macs.get(n, 0.0) for n in self._nodes])
        self._prior = self._noise = np.zeros(len(self._names))

    def rank(self, alone: Mapping[str, float]) -> None:
        """Starts from the noise of each node quantized alone.

        The noise of a node is spread over its tensors by Richardson and Lucy's iteration, which
        keeps every share positive and gives more to a tensor that explains several nodes.

        Args:
            alone: by node; noise relative to the signal, not negative.
        """
        wanted = np.array([min(max(alone[n], 0.0), MOST_NOISE) for n in self._nodes])
        rows = np.repeat(np.arange(len(self._nodes)), [len(t) for t in self._of_node])
        columns = np.concatenate(self._of_node) if self._of_node else np.zeros(0, np.int64)
        count = len(self._names)
        readers = np.maximum(np.bincount(columns, minlength=count), 1)
        noise = np.full(count, float(wanted.mean()) if wanted.size else 0.0)
        for _ in range(_FIT_ROUNDS):
            sums = np.bincount(rows, noise[columns], len(self._nodes))
            off = np.divide(wanted, sums, out=np.zeros_like(wanted), where=sums > 0)
            noise = noise * np.bincount(columns, off[rows], count) / readers
        self._prior = self._noise = noise

    def learn(self, exclude: Collection[str], noise: float) -> None:
        """Takes in what a list was measured to leave; `settle` makes use of it."""
        names = frozenset(exclude)
        self._measured[names] = min(max(noise, 0.0), MOST_NOISE)
        if names not in self._rows:
            self._rows[names] = self._wanted(names)

    def settle(self, target: float) -> None:
        """Fits the noise of each tensor to the measured lists, best near a target.

        The most likely noise under the ranking and the measurements, as Bayesian linear regression
        gives it; negative noise is none.

        Args:
            target: the noise around which lists are to be told apart.
        """
        self._noise = self._prior
        lists = sorted(self._measured.items(), key=lambda item: abs(_far(item[1], target)))
        lists = lists[:_MOST_LEARNT]
        if not lists:
            return
        found = np.array([noise for _, noise in lists])
        rows = np.array([self._rows[exclude] for exclude, _ in lists], np.float64)
        known = self._prior[self._prior > 0]
        doubt = (_DOUBT * self._prior + (0.02 * known.mean() if known.size else 1e-6)) ** 2
        far = np.array([abs(_far(noise, target)) for noise in found])
        least = max(target, 1e-12) * _EXACT
        off = np.maximum(found * (_EXACT + _ELSEWHERE * far), least * 1e-3)
        spread = (rows * doubt) @ rows.T + np.diag(off**2)
        change = doubt * (rows.T @ np.linalg.solve(spread, found - rows @ self._prior))
        self._noise = np.maximum(self._prior + change, 0.0)

    def noise_of(self, exclude: Collection[str]) -> float:
        """What a list is expected to leave."""
        return float(self._noise[self._wanted(exclude)].sum())

    def worst_tensors(self) -> tuple[str, ...]:
        """All tensors, the noisiest first."""
        order = np.argsort(-self._noise, kind="stable")
        return tuple(self._names[at] for at in order)

    def propose(
        self,
        count: int,
        *,
        most_macs: float = math.inf,
        near: Collection[str] = (),
        tried: Collection[frozenset[str]] = (),
        rounds: int = _SEARCH_ROUNDS,
    ) -> frozenset[str] | None:
        """The list of so many nodes that is expected to leave least noise.

        Args:
            count: nodes of the list.
            most_macs: share of the multiply-accumulates that may be in float.
            near: a list to start from; others are looked at as well.
            tried: lists that are not to be proposed again.
            rounds: how often a list is changed in search of a better one.

        Returns:
            None where no list of that size is cheap enough and new.
        """
        size = len(self._nodes) - count
        if size < 0:
            return None
        total = float(self._noise.sum()) or 1.0
        macs = float(self._macs.sum()) or 1.0
        starts: list[Collection[int]] = [()]
        if near:
            starts.append([at for at, n in enumerate(self._nodes) if n not in near])
        for weight in _PRICES if most_macs < math.inf else (0.0,):
            price = self._macs * (weight * total / macs)
            found = [
                self._searched(start, size, price, most_macs, tried, rounds) for start in starts
            ]
            best = min((f for f in found if f is not None), key=lambda f: f[0], default=None)
            if best is not None:
                return best[1]
        return None

    def _wanted(self, exclude: Collection[str]) -> NDArray[np.bool_]:
        """Which tensors are quantized under a list."""
        found = np.zeros(len(self._names), np.bool_)
        for at, node in enumerate(self._nodes):
            if node not in exclude:
                found[self._of_node[at]] = True
        return found

    # -- the search for the best list of one size ------------------------------------------

    def _add(self, choice: _Choice, node: int) -> None:
        choice.quantized[node] = True
        for tensor in self._of_node[node]:
            choice.wanted[tensor] += 1
            if choice.wanted[tensor] == 1:
                choice.gain[self._of_tensor[tensor]] -= self._noise[tensor]
                choice.noise += self._noise[tensor]

    def _drop(self, choice: _Choice, node: int) -> None:
        choice.quantized[node] = False
        for tensor in self._of_node[node]:
            choice.wanted[tensor] -= 1
            if choice.wanted[tensor] == 0:
                choice.gain[self._of_tensor[tensor]] += self._noise[tensor]
                choice.noise -= self._noise[tensor]

    def _fill(
        self, choice: _Choice, size: int, price: NDArray[np.float64], not_this: int = -1
    ) -> None:
        """Quantizes the node that costs least, until there are enough."""
        missing = size - int(choice.quantized.sum())
        for _ in range(missing):
            cost = np.where(choice.quantized, math.inf, choice.gain - price)
            if not_this >= 0:
                cost[not_this] = math.inf
            self._add(choice, int(np.argmin(cost)))

    def _searched(
        self,
        start: Collection[int],
        size: int,
        price: NDArray[np.float64],
        most_macs: float,
        tried: Collection[frozenset[str]],
        rounds: int,
    ) -> tuple[float, frozenset[str]] | None:
        """Least noise and its list, by taking out a few nodes and filling up again."""
        count = len(self._nodes)
        alone = np.array([float(self._noise[t].sum()) for t in self._of_node])
        choice = _Choice(
            np.zeros(count, np.bool_), np.zeros(len(self._names), np.int64), alone, 0.0
        )
        for node in start:
            self._add(choice, node)
        while int(choice.quantized.sum()) > size:
            last = np.array([
                float(self._noise[t[choice.wanted[t] == 1]].sum()) if choice.quantized[n] else -1.0
                for n, t in enumerate(self._of_node)
            ]) - np.where(choice.quantized, price, 0.0)  # fmt: skip
            last[~choice.quantized] = -math.inf
            self._drop(choice, int(np.argmax(last)))
        self._fill(choice, size, price)
        random = np.random.default_rng(size)
        best: tuple[float, frozenset[str]] | None = None

        def better(now: _Choice) -> None:
            nonlocal best
            if best is not None and now.noise >= best[0] - 1e-15:
                return
            if float(self._macs[~now.quantized].sum()) > most_macs + 1e-12:
                return
            names = frozenset(
                n for n, held in zip(self._nodes, now.quantized, strict=True) if not held
            )
            if names not in tried:
                best = (now.noise, names)

        better(choice)
        for _ in range(min(rounds, 20 * count) if 0 < size < count else 0):
            held = np.flatnonzero(choice.quantized)
            few = int(random.integers(1, 6))
            around = int(random.integers(count))
            if random.random() < 0.5:
                # Nodes that share tensors with one node.
                near = np.unique(np.concatenate(
                    [self._of_tensor[t] for t in self._of_node[around]] or [held[:1]]
                ))  # fmt: skip
                out = [int(n) for n in near if choice.quantized[n]][:few]
            else:
                out = [int(n) for n in random.choice(held, min(few, held.size), replace=False)]
            if not out or size - len(out) + 1 > count - 1:
                continue
            other = choice.copy()
            for node in out:
                self._drop(other, node)
            self._fill(other, size, price, not_this=out[0])
            worth = [c.noise - float(price[c.quantized].sum()) for c in (other, choice)]
            better(other)
            if worth[0] < worth[1]:
                choice = other
        return best


def _far(noise: float, target: float) -> float:
    """How far apart two noises are, as a logarithm; 0 where they are equal."""
    return math.log(max(noise, 1e-12) / max(target, 1e-12))
