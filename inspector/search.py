"""The smallest list of nodes to leave in float with which a quantized model reaches a goal.

What is tried follows from what was found and from nothing else, so that it does not depend on where
or in which order trials run. First each node is quantized alone, on few samples: the noise it makes
ranks the nodes, and starts the model of `noise_model`. This proposes the least noisy list of a
size; sizes are bisected, and every list that is measured teaches the model more. When the size
falls no further, each node of the list is put back (pruned) with all others as they are, and what
that shows may give shorter lists with other nodes. A list counts when all samples reach the goal;
one that is far off on few samples is not tried on the rest.

Apart from `sensitivity`, which says what each node costs and decides nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from inspector.errors import ExclusionError, QuantizationError, RunError
from inspector.noise_model import MOST_NOISE, NoiseModel
from inspector.output_metrics import Guided, OutputSqnr
from inspector.pareto import front_of, knee_of
from inspector.preview import Change, RecipeSource
from inspector.quantizer import UnplannableError
from inspector.runtime import Progress, no_progress
from inspector.search_result import Goal, SearchResult, SearchTrial, figure_text
from inspector.trials import LostError, Request, Trial, Trials

# Samples of a first look; up to half as many more are all looked at.
COARSE_SAMPLES = 4
# A list this far off on few samples, as a share of the whole way to the goal, is given up.
_HOPELESS = 0.1
# The same of what is counted, which jumps more.
_HOPELESS_COUNT = 0.5
# New lists of one size that are tried before that size is given up.
_PROPOSALS = 4
# So many nodes are put back side by side.
_PRUNED = 8
# Whole lists that are pruned, at most; of what is counted, whose noise tells less, some more.
_PRUNINGS = 1
_PRUNINGS_COUNT = 6
# Lists that are really quantized until the deployed model reaches the goal.
_DEPLOYED_ROUNDS = 8
# SQNR that a list has to gain where the goal itself cannot be raised by what was lost.
_RAISED_DB = 0.5
_WORST_TENSORS = 5
# A list so short is one of culprits.
_FEW_NODES = 2
# Share of what all nodes in float would gain that a list is to have where that is not enough.
_NEARLY = 0.9


# Why one list cannot be made or run; anything else is wrong with all of them.
_REFUSALS = (ExclusionError, QuantizationError, RunError, UnplannableError)


class _Enough(Exception):
    """The search is to end with what it has."""


def find_exclusions(
    trials: Trials,
    goal: Goal,
    *,
    candidates: Sequence[str],
    accept: Callable[[frozenset[str]], float] | None = None,
    judged: Sequence[int] | None = None,
    max_float_macs: float | None = None,
    budget_seconds: float | None = None,
    coarse_samples: int = COARSE_SAMPLES,
    progress: Progress = no_progress,
    stop: Callable[[], bool] = lambda: False,
) -> SearchResult:
    """The smallest list that reaches a goal, or the best so far.

    Anytime: `stop`, the budget and Ctrl-C end it with what it has. Trials that are kept in a folder
    are not run again.

    Args:
        trials: of the goal's metric, best with `output_metrics.guided`.
        goal: what to reach.
        candidates: the nodes to choose from, in graph order: `quantized_nodes`.
        accept: gives the figure of a list's real file; it then has to reach the goal as well.
        judged: indices of the samples that count; None for all.
        max_float_macs: share of the multiply-accumulates, 0..1, that the list may put in float.
        budget_seconds: after this nothing new is tried. What is found then depends on the clock.
        coarse_samples: how many are looked at first.
        progress: told the phase, how many lists were run and the best so far.
        stop: asked before every trial.

    Raises:
        InspectorError: the models cannot be run.
    """
    search = _Search(
        trials, goal, tuple(candidates), accept, judged, max_float_macs, budget_seconds,
        coarse_samples, progress, stop,
    )  # fmt: skip
    return search.run()


class _Search:
    """The state of one search."""

    def __init__(
        self,
        trials: Trials,
        goal: Goal,
        candidates: tuple[str, ...],
        accept: Callable[[frozenset[str]], float] | None,
        judged: Sequence[int] | None,
        max_float_macs: float | None,
        budget_seconds: float | None,
        coarse_samples: int,
        progress: Progress,
        stop: Callable[[], bool],
    ) -> None:
        self.begin = time.monotonic()
        self.trials, self.goal, self.accept = trials, goal, accept
        self.inner = goal
        self.nodes = candidates
        self.every = frozenset(candidates)
        self.samples = tuple(trials.every if judged is None else judged)
        few = max(1, coarse_samples)
        step = len(self.samples) / few
        self.few = self.samples
        if 2 * len(self.samples) > 3 * few:
            self.few = tuple(self.samples[int(at * step)] for at in range(few))
        self.most_macs = math.inf if max_float_macs is None else max_float_macs
        self.max_float_macs = max_float_macs
        self.until = math.inf if budget_seconds is None else self.begin + budget_seconds
        self.progress, self.stop = progress, stop
        self.phase, self.share = "float and quantized model", (0.0, 0.05)
        # What is known of each list: its figure and noise on all samples, noise on few.
        self.figures: dict[frozenset[str], float] = {}
        self.noises: dict[frozenset[str], float] = {}
        self.changes: dict[frozenset[str], Change] = {}
        self.failed: dict[frozenset[str], str] = {}
        # Noise on few samples of the lists that ran on all, with what all of them made of it: how
        # much the figure differs, and by which factor the noise.
        self.offs: list[tuple[float, float, float]] = []
        self.tried: set[frozenset[str]] = set()
        self.deployed: dict[frozenset[str], float] = {}
        # SQNR in dB that a list needs beside the goal, see `_accepted`.
        self.least_db = -math.inf
        self.model: NoiseModel | None = None
        # The nodes by the noise that each makes alone, the least first.
        self.ranked: list[str] = []
        self.best: frozenset[str] | None = None
        self.notes: list[str] = []

    # -- trials ----------------------------------------------------------------------------

    def _told(self, fraction: float, _message: str) -> None:
        """Passes on where the search is; ends it where it is to end."""
        if self.stop():
            raise _Enough("stopped")
        if time.monotonic() > self.until:
            raise _Enough("the budget is used up")
        low, high = self.share
        text = f"{self.phase}, {self.trials.evaluations} trials"
        if self.best is not None:
            best = figure_text(self.goal, self._known(self.best))
            text += f", best {len(self.best)} nodes: {best}"
        self.progress(low + (high - low) * fraction, text)

    def _known(self, names: frozenset[str]) -> float:
        return self.figures.get(names, math.nan)

    def _wave(self, lists: Sequence[frozenset[str]], samples: Sequence[int]) -> list[Trial | None]:
        """Trials of several lists; None for one that cannot be made or run."""
        self._told(0.0, "")
        wanted = [names for names in lists if names not in self.failed]
        found: dict[frozenset[str], Trial] = {}
        try:
            requests = [Request(exclude=names) for names in wanted]
            got = self.trials.measure_all(requests, samples, progress=self._told)
            found = dict(zip(wanted, got, strict=True))
        except LostError:
            raise
        except _REFUSALS:
            # One of them, and which one is not said.
            for names in wanted:
                self._told(0.0, "")
                try:
                    [found[names]] = self.trials.measure_all([Request(exclude=names)], samples)
                except LostError:
                    raise
                except _REFUSALS as error:
                    if not names:
                        raise
                    self.failed[names] = str(error)
        return [found.get(names) for names in lists]

    def _noise(self, trial: Trial, samples: Sequence[int]) -> float:
        """Noise of a trial relative to the signal; `MOST_NOISE` where it is not finite."""
        sums, metric = trial.total(samples), self.trials.metric
        if isinstance(metric, Guided):
            noise = metric.noise(sums)
        else:
            figure = metric.figure(sums)
            if isinstance(metric, OutputSqnr) or self.goal.unit == "dB":
                noise = math.nan if math.isnan(figure) else 10.0 ** (-min(figure, 300.0) / 10.0)
            else:
                # Nothing but the figure is known: its distance from the float model's.
                whole_float = self._known(self.every)
                noise = self.goal.worth(whole_float) - self.goal.worth(figure)
        return min(max(noise, 0.0), MOST_NOISE) if math.isfinite(noise) else MOST_NOISE

    def _on_all(self, names: frozenset[str]) -> float:
        """A list's figure on all samples; nan where it cannot be run."""
        if names not in self.figures:
            [trial] = self._wave([names], self.samples)
            if trial is None:
                self.figures[names], self.noises[names] = math.nan, MOST_NOISE
                return math.nan
            self._take(names, trial)
        return self.figures[names]

    def _take(self, names: frozenset[str], trial: Trial) -> None:
        """Keeps what a trial on all samples gave."""
        self.figures[names] = self.trials.figure(trial, self.samples)
        self.noises[names] = self._noise(trial, self.samples)
        if self.model is not None:
            self.model.learn(names, self.noises[names])
        if self.few != self.samples:
            few = self._noise(trial, self.few)
            off = self.figures[names] - self.trials.figure(trial, self.few)
            if math.isfinite(off) and 0 < few < MOST_NOISE and 0 < self.noises[names] < MOST_NOISE:
                self.offs.append((few, off, self.noises[names] / few))

    def _expected(self, trial: Trial) -> tuple[float, float]:
        """Figure and noise on all samples of a trial on few, going by the list most like it."""
        figure, noise = self.trials.figure(trial, self.few), self._noise(trial, self.few)
        if not self.offs or noise <= 0:
            return figure, noise
        alike = min(self.offs, key=lambda off: abs(math.log(off[0] / noise)))
        # What is counted is not off by the same everywhere: 1 of few may be 1 of all.
        off = alike[1] if self.goal.unit == "dB" else 0.0
        return figure + off, min(noise * alike[2], MOST_NOISE)

    def _price(self, names: frozenset[str]) -> Change | None:
        """What a list costs; None where it cannot be made."""
        if names not in self.changes and names not in self.failed:
            try:
                self.changes[names] = self.trials.source.change(names, None)
            except _REFUSALS as error:
                self.failed[names] = str(error)
        return self.changes.get(names)

    def _affordable(self, names: frozenset[str]) -> bool:
        if self.most_macs == math.inf:
            return True
        price = self._price(names)
        return price is not None and not price.float_macs_fraction > self.most_macs + 1e-12

    def _reaches(self, names: frozenset[str]) -> bool:
        """Whether a list reaches the goal; far off on few samples, the rest are not run."""
        self.tried.add(names)
        if names not in self.figures and self.few != self.samples:
            [trial] = self._wave([names], self.few)
            if trial is None:
                return False
            figure, noise = self._expected(trial)
            if self._hopeless(figure):
                if self.model is not None:
                    self.model.learn(names, noise)
                return False
        self._on_all(names)
        return self._good(names)

    def _hopeless(self, expected: float) -> bool:
        """Whether a figure that few samples promise is too far off to run all of them."""
        missing = self.inner.short_of(expected)
        way = abs(self.goal.short_of(self._known(frozenset())))
        share = _HOPELESS_COUNT if self._counts else _HOPELESS
        slack = share * way if math.isfinite(way) else 0.0
        return math.isnan(missing) or missing > slack

    def _good(self, names: frozenset[str]) -> bool:
        """Whether a list that was measured on all samples will do, simulated."""
        noise = self.noises.get(names, MOST_NOISE)
        enough = noise <= 10.0 ** (-self.least_db / 10.0) if self.least_db > -math.inf else True
        good = enough and self.inner.reached(self._known(names)) and self._affordable(names)
        if good and (self.best is None or self._order(names) < self._order(self.best)):
            self.best = names
        return good

    def _order(self, names: frozenset[str]) -> tuple[int, float, tuple[str, ...]]:
        """Shorter lists first, then less noise, then their names."""
        return len(names), self.noises.get(names, MOST_NOISE), tuple(sorted(names))

    @property
    def _counts(self) -> bool:
        """Whether the figure counts things, and so jumps where noise does not."""
        return self.goal.unit != "dB"

    # -- the search ------------------------------------------------------------------------

    def run(self) -> SearchResult:
        """See `find_exclusions`."""
        ended, reached = "", False
        found: frozenset[str] | None = None
        try:
            found, reached = self._searched()
        except _Enough as enough:
            ended = str(enough)
        except KeyboardInterrupt:
            ended = "stopped"
        if found is None:
            found, reached = self._so_far(ended)
        return self._result(found, reached, ended)

    def _searched(self) -> tuple[frozenset[str] | None, bool]:
        nothing: frozenset[str] = frozenset()
        self._on_all(nothing)
        if self._reaches(nothing) and self._accepted(nothing):
            return nothing, True
        if self.accept is not None:
            self._accepted(nothing)
        if not self.nodes:
            self.notes.append("nothing of this model is quantized")
            return nothing, False
        self._on_all(self.every)
        self.tried |= {nothing, self.every}
        best = self._known(self.every)
        if not self._reached_by_float():
            self.notes.append(
                "even with every node in float the goal is not reached: "
                f"{figure_text(self.goal, best)}"
            )
            self._rank()
            return self._most_of(best), False
        self._rank()
        for _ in range(_DEPLOYED_ROUNDS if self.accept is not None else 1):
            found = self._smallest()
            if found is None:
                break
            if self._accepted(found):
                shorter = self._passing(found) if self._counts else None
                return shorter or found, True
            self._raise(found)
        found = self._passing(self.every)
        if found is None:
            self._longest()
        return found, False

    def _passing(self, than: frozenset[str]) -> frozenset[str] | None:
        """A shorter list that reaches the goal simulated and, of the next few, deployed."""
        if self.accept is None:
            return None
        passing = [n for n in self.figures if len(n) < len(than) and n not in self.deployed]
        passing = [n for n in passing if self.goal.reached(self._known(n)) and self._affordable(n)]
        for names in sorted(passing, key=self._order)[:_DEPLOYED_ROUNDS]:
            if self._accepted(names):
                return names
        return None

    def _longest(self) -> None:
        """Measures the longest list, which shows how far one gets."""
        longest = [self.every - {n} for n in self.ranked[:1] if len(self.nodes) > 1]
        for names in longest:
            if self._affordable(names):
                self._on_all(names)

    def _reached_by_float(self) -> bool:
        """Whether the goal is reached where nothing is quantized."""
        return self.inner.reached(self._known(self.every))

    def _most_of(self, best: float) -> frozenset[str] | None:
        """The shortest list that gets nearly as far as a figure that misses the goal."""
        before = self._known(frozenset())
        if not math.isfinite(before) or not math.isfinite(best):
            return None
        self.inner = replace(self.goal, value=before + _NEARLY * (best - before))
        return self._smallest()

    def _rank(self) -> None:
        """Measures each node quantized alone, and starts the noise model from it."""
        self.phase, self.share = "ranking", (0.05, 0.5)
        lists = [self.every - {name} for name in self.nodes]
        found = self._wave(lists, self.few)
        alone = {
            name: MOST_NOISE if trial is None else self._noise(trial, self.few)
            for name, trial in zip(self.nodes, found, strict=True)
        }
        self.ranked = sorted(self.nodes, key=alone.__getitem__)
        source = self.trials.source
        least = source.places(self.every)
        every = self._price(self.every)
        macs, tensors = {}, {}
        for name, names in zip(self.nodes, lists, strict=True):
            price = self._price(names)
            share = 0.0
            if price is not None and every is not None:
                share = every.float_macs_fraction - price.float_macs_fraction
            macs[name] = share if share > 1e-12 else 0.0
            tensors[name] = source.places(names) - least or {name}
        self.model = NoiseModel(tensors, macs)
        self.model.rank(alone)
        for names, noise in self.noises.items():
            self.model.learn(names, noise)
        if self.few == self.samples:
            for names, trial in zip(lists, found, strict=True):
                if trial is not None:
                    self.figures[names] = self.trials.figure(trial, self.samples)
                    self.noises[names] = self._noise(trial, self.samples)

    def _target(self) -> float:
        """The noise at which the goal is about reached."""
        if self.goal.unit == "dB" and not isinstance(self.trials.metric, Guided):
            return float(10.0 ** (-max(self.inner.value, self.least_db) / 10.0))
        if self.best is not None:
            return self.noises[self.best]
        missed = [n for names, n in self.noises.items() if not self._good(names)]
        return min(missed, default=1.0)

    def _propose(
        self, count: int, near: frozenset[str] | tuple[()] | None = None
    ) -> frozenset[str] | None:
        """The most promising list of a size that can be paid and was not tried.

        Args:
            count: its size.
            near: a list that it may start from; None for the best one.
        """
        assert self.model is not None
        self.model.settle(self._target())
        most = self.most_macs
        for _ in range(_PROPOSALS):
            found = self.model.propose(
                count,
                most_macs=most,
                near=(self.best or ()) if near is None else near,
                tried=self.tried,
            )
            if found is None or self._affordable(found):
                return found
            # The model counts nodes; what else computes in float only the quantizer knows.
            self.tried.add(found)
            price = self._price(found)
            if price is not None and most < math.inf:
                most = max(0.0, most - (price.float_macs_fraction - self.most_macs))
        return None

    def _smallest(self) -> frozenset[str] | None:
        """The shortest list that reaches the goal as it stands now, simulated."""
        self.best = None
        for names in sorted(self.figures, key=self._order):
            self._good(names)
        self.phase, self.share = "sizes", (0.5, 0.7)
        self._bisect()
        if self.best is None:
            return None
        if self._counts:
            self._scan()
        self.phase, self.share = "pruning", (0.7, 1.0)
        for _ in range(_PRUNINGS_COUNT if self._counts else _PRUNINGS):
            self._shorten()
            before = self.best
            if before:
                self._prune()
            if self.best == before:
                break
        return None if self.best == self.every else self.best

    def _bisect(self) -> None:
        """Finds a size that reaches the goal, between one that does not and one that does."""
        assert self.model is not None
        if self.best is None or self.best == self.every:
            count = self._most()
            for _ in range(_PROPOSALS):
                # All that can be paid for.
                found = self._propose(count) if count < len(self.nodes) else self.every
                if found is not None and self._reaches(found):
                    break
                if self.best is not None or (found is None and count == 0):
                    break
                count = count if found is not None and count < len(self.nodes) else count - 1
        if self.best is None:
            return
        low = 0
        guess = self._guess()
        while len(self.best) - low > 1:
            high = len(self.best)
            if low < guess < high:
                count, guess = guess, -1
            else:
                count = max(low + 1, round(math.sqrt(max(low, 1) * high)))
                if low:
                    count = (low + high) // 2
            found = self._propose(min(count, high - 1))
            if found is None or not self._reaches(found):
                low = count

    def _scan(self) -> None:
        """Tries lists of rising size: what is counted may be reached by a short one and not by
        longer ones, which no bisection sees."""
        count = 1
        while self.best and count < len(self.best):
            for _ in range(_PROPOSALS):
                found = self._propose(count, near=())
                if found is None:
                    break
                if self._reaches(found):
                    return
            count = max(count + 1, round(1.4 * count))

    def _most(self) -> int:
        """How many nodes a list can have at most at the price."""
        assert self.model is not None
        left, count = 0.0, 0
        shares = sorted(self.model.float_macs.values())
        for share in shares:
            left += share
            count += left <= self.most_macs + 1e-12
        return count

    def _guess(self) -> int:
        """The shortest list that the model expects to do, where the goal is one of noise."""
        assert self.model is not None
        if self.goal.unit != "dB" or isinstance(self.trials.metric, Guided):
            return -1
        target, low, high = self._target(), 0, len(self.nodes)
        self.model.settle(target)
        while high - low > 1:
            middle = (low + high) // 2
            found = self.model.propose(middle, most_macs=self.most_macs, rounds=0)
            if found is not None and self.model.noise_of(found) <= target:
                high = middle
            else:
                low = middle
        return high

    def _shorten(self) -> None:
        """Proposes shorter lists until several of one size have failed."""
        step, failed = 1, 0
        while self.best and failed < _PROPOSALS:
            count = max(len(self.best) - step, 0)
            self._told(0.5, "")
            found = self._propose(count)
            if found is not None and self._reaches(found):
                step, failed = 2 * step, 0
            elif step > 1:
                step = 1
            elif found is None:
                return
            else:
                failed += 1

    def _prune(self) -> None:
        """Puts nodes of the list back, one at a time, until one does that leaves the goal reached.

        Those that are expected to do least harm come first; where the best of some is hopeless, the
        others are not tried.
        """
        assert self.best is not None
        assert self.model is not None
        whole_list, model = self.best, self.model
        model.settle(self._target())
        lists = [whole_list - {n} for n in self.nodes if n in whole_list]
        lists = [names for names in lists if names not in self.tried]
        lists.sort(key=model.noise_of)
        for start in range(0, len(lists), _PRUNED):
            some = lists[start : start + _PRUNED]
            found = self._wave(some, self.few)
            order = []
            for names, trial in zip(some, found, strict=True):
                if trial is None:
                    continue
                if self.few == self.samples:
                    self._take(names, trial)
                    order.append((not self._good(names), self.noises[names], names))
                    continue
                figure, noise = self._expected(trial)
                model.learn(names, noise)
                order.append((self._hopeless(figure), noise, names))
            order.sort(key=lambda each: each[:2])
            self.tried.update(names for hopeless, _, names in order if hopeless)
            promising = [names for hopeless, _, names in order if not hopeless]
            if any(self._reaches(names) for names in promising):
                return
            if not promising and not self._counts:
                return

    # -- the deployed model ----------------------------------------------------------------

    def _accepted(self, names: frozenset[str]) -> bool:
        """Whether the real file reaches the goal; True where that is not asked for."""
        if self.accept is None:
            return True
        if names not in self.deployed:
            self.phase, self.share = f"quantizing with {len(names)} nodes in float", (0.95, 1.0)
            self._told(0.0, "")
            try:
                self.deployed[names] = self.accept(names)
            except (QuantizationError, RunError) as error:
                self.failed[names] = error.message
                self.deployed[names] = math.nan
        return self.goal.reached(self.deployed[names])

    def _raise(self, missed: frozenset[str]) -> None:
        """Asks for more where the deployed model has lost something."""
        gap = self.goal.worth(self._known(missed)) - self.goal.worth(self.deployed[missed])
        raised = self.goal.raised(gap) if gap > 0 and math.isfinite(gap) else self.goal
        best = max(self.goal.worth(figure) for figure in self.figures.values())
        if self.inner.worth(self.inner.value) < raised.worth(raised.value) <= best:
            self.inner = raised
        else:
            # No figure is that good (a share is 1 at most): less noise has to do.
            own = -10.0 * math.log10(max(self.noises[missed], 1e-30))
            self.least_db = max(self.least_db, own) + _RAISED_DB
        self.notes.append(
            f"a list of {len(missed)} nodes has {figure_text(self.goal, self._known(missed))} "
            f"simulated and {figure_text(self.goal, self.deployed[missed])} deployed"
        )

    # -- what there is ---------------------------------------------------------------------

    def _so_far(self, ended: str) -> tuple[frozenset[str], bool]:
        """The best list of what was measured, and whether it reaches the goal."""
        accepted = [n for n, figure in self.deployed.items() if self.goal.reached(figure)]
        if accepted:
            return min(accepted, key=self._order), True
        # With every node in float there is nothing to quantize.
        payable = [n for n in self.figures if n != self.every and self._affordable(n)]
        reaching = [n for n in payable if self.goal.reached(self.figures[n])]
        reaching = [n for n in reaching if n not in self.deployed]
        if reaching:
            best = min(reaching, key=self._order)
            try:
                self.until, self.stop = math.inf, lambda: False
                if self._accepted(best):
                    return best, True
            except (_Enough, KeyboardInterrupt):
                pass
        best = min(
            payable or [frozenset()],
            key=lambda n: (-self._worth(n), self._order(n)),
        )
        # A list that gains nothing is none.
        nothing: frozenset[str] = frozenset()
        if not ended:
            self._accepted(best)
        return (best if self._worth(best) > self._worth(nothing) else nothing), False

    def _worth(self, names: frozenset[str]) -> float:
        """A list's figure, deployed where that is known, so that higher is better."""
        return self.goal.worth(self.deployed.get(names, self._known(names)))

    def _worst_tensors(self, found: frozenset[str]) -> tuple[str, ...]:
        """Activations that an override can be given: of a short list's nodes, then the noisiest."""
        if self.model is None or not isinstance(self.trials.source, RecipeSource):
            return ()
        source = self.trials.source
        able = source.board.whole.activations
        least = source.places(self.every)
        own = [
            t
            for n in sorted(found if len(found) <= _FEW_NODES else ())
            for t in sorted(source.places(self.every - {n}) - least)
        ]
        wanted = (
            source.carriers.get(t, t) for t in (*own, *self.model.worst_tensors()) if t in able
        )
        return tuple(dict.fromkeys(wanted))[:_WORST_TENSORS]

    def _result(self, found: frozenset[str], reached: bool, ended: str) -> SearchResult:
        order = {name: at for at, name in enumerate(self.nodes)}
        nothing: frozenset[str] = frozenset()
        if self.accept is not None and found not in self.deployed and not ended:
            self._accepted(found)
        if found in self.deployed:
            reached = self.goal.reached(self.deployed[found]) and self._affordable(found)
        own, whole_model = self._price(found), self._price(nothing)
        everything = self._price(self.every)
        trials = []
        for names, figure in self.figures.items():
            # With one node quantized, a list is a ranking's, and nobody's choice.
            ranking = len(names) == len(self.nodes) - 1 and len(names) > 1 and names != found
            price = None if ranking else self._price(names)
            if price is not None:
                trials.append(
                    SearchTrial(
                        nodes=tuple(sorted(names, key=order.__getitem__)),
                        figure=figure,
                        float_macs_fraction=price.float_macs_fraction,
                        weight_bytes=price.weight_bytes,
                        deployed=self.deployed.get(names),
                    )
                )
        trials.sort(key=lambda t: (len(t.nodes), t.nodes))
        points = [(t.float_macs_fraction, self.goal.worth(t.figure)) for t in trials]
        front = front_of(points)
        knee = knee_of([points[at] for at in front])
        on_front = set(front)
        deployed = self.accept is not None and found in self.deployed
        return SearchResult(
            goal=self.goal,
            reached=reached,
            nodes=tuple(sorted(found, key=order.__getitem__)),
            before=self._known(nothing),
            after=self._known(found),
            deployed_before=self.deployed.get(nothing) if deployed else None,
            deployed_after=self.deployed.get(found) if deployed else None,
            evaluations=self.trials.evaluations,
            seconds=time.monotonic() - self.begin,
            samples=len(self.samples),
            candidates=len(self.nodes),
            float_macs_fraction=math.nan if own is None else own.float_macs_fraction,
            weight_bytes=0 if own is None else own.weight_bytes,
            whole_float_macs_fraction=math.nan
            if whole_model is None
            else whole_model.float_macs_fraction,
            whole_weight_bytes=0 if whole_model is None else whole_model.weight_bytes,
            float_weight_bytes=0 if everything is None else everything.weight_bytes,
            trials=tuple(replace(t, front=at in on_front) for at, t in enumerate(trials)),
            knee=None if knee is None else front[knee],
            ended=ended,
            most_float_macs=self.max_float_macs,
            worst_tensors=self._worst_tensors(found),
            notes=tuple(dict.fromkeys((*self.trials.notes, *self.notes))),
        )
