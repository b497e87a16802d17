"""fit_tau: which tau, or which tau per site, meets a budget of work, of time, or of quality.

Every search is along a path from the setting that executes most to the one that executes least: all sites
alike, or as an `Allocation` around the last solution says. Targets are measured, never predicted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, overload

import torch
from torch import nn

from .allocating import Path, Setting, Shares, allocate, straight
from .attachment import attached, states
from .capture import unwrap
from .errors import BudgetError, CalibrationError, CalibrationWarning
from .harm import Distance, survey
from .measuring import Measuring, Stats, measure
from .pacing import Pace
from .probe import arguments, probing
from .setting import set_numbers
from .state import State

TOLERANCE = 0.003  # of the budget's unit, a share of 1; below the noise of any real stream
EVALUATIONS = 24  # enough to bisect 0..1 to 1e-7
ROUNDS = 2  # allocations, each around the solution of the one before
TARGETS = ("budget", "macs", "site_macs", "time", "quality")


@dataclass
class Search:
    """One call of `fit_tau`: the target, and how far a setting is from it.

    Attributes:
        name, target: which of TARGETS, and its value.
        metric: what a quality floor is for.
        shares: what sites executed at the taus that were measured.
        noise: of the last excess, where it was timed.
    """

    model: nn.Module
    batches: Sequence[Any]
    name: str
    target: float
    metric: Callable[[nn.Module], float] | None
    shares: Shares = field(default_factory=Shares)
    noise: float = 0.0
    _outside: int | None = None
    _pace: Pace | None = None

    @cached_property
    def runnable(self) -> nn.Module:
        """What a metric is called with: the model as given if it is compiled, else compiled here.

        A converted model that nobody compiled runs dense, so that every tau would have one quality.
        """
        in_place = getattr(self.model, "_compiled_call_impl", None) is not None
        if in_place or unwrap(self.model) is not self.model:
            return self.model
        compiled = torch.compile(
            self.model, backend="d2dmoe", dynamic=True, options={"inner": "eager"}
        )
        assert isinstance(compiled, nn.Module)
        return compiled

    def excess(self, setting: Setting) -> float:
        """How far above the target a setting is; sets it."""
        set_numbers(self.model, setting)
        if self.metric is not None:
            return float(self.metric(self.runnable)) - self.target
        if self.name == "time":
            self._pace = self._pace or Pace(self.model, self.batches)
            ratio, self.noise = self._pace.ratio(setting)
            return ratio - self.target
        return self._cost(self.tally(setting)) - self.target

    def _cost(self, stats: Stats) -> float:
        if self.name == "budget":
            return stats.executed
        macs = sum(site.macs for site in stats.sites.values())
        dense = sum(site.dense_macs for site in stats.sites.values())
        if self.name == "site_macs":
            return macs / dense
        if self._outside is None:
            self._outside = measure(self.model, self.batches).dense_macs - dense
        return (self._outside + macs) / (self._outside + dense)

    def tally(self, setting: Setting) -> Stats:
        """What the sites execute at a setting, in one pass over the batches; sets it."""
        set_numbers(self.model, setting)
        observer = Measuring(flops=False)
        with probing(self.model, observer) as call:
            for batch in self.batches:
                args, kwargs = arguments(batch)
                call(*args, **kwargs)
        for name, site in observer.stats.sites.items():
            self.shares.note(name, setting[name], site.executed)
        return observer.stats

    def along(self, path: Path) -> dict[str, float]:
        """The setting of a path that meets the target: within the cost, or at the floor; sets it."""
        if self.metric is not None:
            u = _largest_above(lambda u: self.excess(path(u)))
        else:
            u = _smallest_below(lambda u: self.excess(path(u)), lambda: max(TOLERANCE, self.noise))
        set_numbers(self.model, path(u))
        return path(u)


@overload
def fit_tau(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: float | None = ...,
    macs: float | None = ...,
    site_macs: float | None = ...,
    time: float | None = ...,
    quality: float | None = ...,
    metric: Callable[[nn.Module], float] | None = ...,
    per_site: Literal[False] = ...,
    distance: Distance | None = ...,
) -> float: ...


@overload
def fit_tau(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: float | None = ...,
    macs: float | None = ...,
    site_macs: float | None = ...,
    time: float | None = ...,
    quality: float | None = ...,
    metric: Callable[[nn.Module], float] | None = ...,
    per_site: Literal[True],
    distance: Distance | None = ...,
) -> dict[str, float]: ...


def fit_tau(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: float | None = None,
    macs: float | None = None,
    site_macs: float | None = None,
    time: float | None = None,
    quality: float | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    per_site: bool = False,
    distance: Distance | None = None,
) -> float | dict[str, float]:
    """The one tau for all sites, or one per site, that meets a target on the batches; sets and returns it.

    Args:
        batches: as for `convert`, held in memory and run many times.
        budget: executed share of (token, expert) pairs.
        macs: multiply-adds of the whole model, routers included, as a share of the dense ones.
        site_macs: the same of the converted blocks alone.
        time: of the model compiled with backend="d2dmoe", as a share of that at tau = 0, medians of runs
            that take turns; met within what those vary.
        quality: a floor of `metric(model)`, larger being better. metric is called with the model compiled, by
            the caller or else here with backend="d2dmoe"; it has to run what it is given, without gradients.
        per_site: give {site name: tau} instead of one number. Sites whose skipped experts harm the output
            least are made sparser: least total `distance` to the dense output for a cost, or least
            multiply-adds of the converted blocks for a quality. One tau for all is given where that is
            better on these batches.
        distance: (output, dense output) of one batch -> a number >= 0. None: of `.logits` the
            Kullback-Leibler divergence, else the relative squared error of the output's first tensor, at
            positions that the attention mask has.

    The smallest tau within the cost, or the largest that keeps the quality, to 0.003 of the target. One
    search takes about 10 passes over the batches (two compiled models and their timings for `time`, calls
    of metric for `quality`); `per_site` takes three searches and 2 (2 + 6 S) + 3 passes more for S sites.

    Raises BudgetError if not exactly one target is given or none reaches it; taus are then what they were
    before. Source: one tau for all is the paper's (Szatkowski et al. 2024, section 3.3); the allocation is
    the Lagrangian of a separable budget (Everett 1963).
    """
    given = dict(zip(TARGETS, (budget, macs, site_macs, time, quality), strict=True))
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1 or (quality is not None) != (metric is not None):
        raise BudgetError(
            f"Seen: {', '.join(chosen) or 'no target'}{' and a metric' if metric else ''}. Expected "
            "exactly one of budget=, macs=, site_macs=, time= (shares of 1), or quality= together with "
            "metric=."
        )
    sites = attached(model)
    held = list(batches)
    if not held and metric is None:
        raise CalibrationError("There are no batches to measure; expected at least one.")
    before = {state.site.name: state.tau for state in states(model)}
    name, target = next(iter(chosen.items()))
    search = Search(model, held, name, target, metric)
    try:
        found = search.along(straight(sites))
        if per_site:
            found = _refined(search, sites, found, distance)
    except BaseException:
        set_numbers(model, before)
        raise
    set_numbers(model, found)
    return found if per_site else next(iter(found.values()))


def _refined(
    search: Search, sites: Sequence[State], start: dict[str, float], distance: Distance | None
) -> dict[str, float]:
    """The best of the setting for all sites and ROUNDS allocations, each around the one before."""
    found = [start]
    for _ in range(ROUNDS):
        search.tally(found[-1])
        path = allocate(search.model, search.batches, sites, found[-1], search.shares, distance)
        try:
            found.append(search.along(path))
        except BudgetError:  # not within the reach of this path; what is found already is
            break
    outcomes = survey(search.model, search.batches, found, distance)
    worth = [o.macs if search.metric is not None else o.harm for o in outcomes]
    return found[worth.index(min(worth))]


def _smallest_below(excess: Callable[[float], float], tolerance: Callable[[], float]) -> float:
    """The smallest u in 0..1 whose excess is at most 0, and within the tolerance of it if it can be."""
    low, high = 0.0, 1.0
    above = excess(low)
    if above <= 0:
        return low
    below = excess(high)
    if below > 0:
        raise BudgetError(
            f"Even tau = 1, the arg-max expert alone, is {below:.3f} above the target. Ask for more, "
            "or convert with more experts per block."
        )
    for i in range(EVALUATIONS):
        # By turns where a straight line meets the target, but for a little, and in the middle.
        where = (above + tolerance() / 2) / (above - below) if i % 2 == 0 else 0.5
        middle = low + (high - low) * min(max(where, 0.02), 0.98)
        value = excess(middle)
        if value > 0:
            low, above = middle, value
        else:
            high, below = middle, value
            if value > -tolerance():
                break
    return high


def _largest_above(excess: Callable[[float], float]) -> float:
    """The largest u in 0..1 whose excess is at least 0, taking it to fall with u."""
    low, high = 0.0, 1.0
    least = excess(low)
    if least < 0:
        raise BudgetError(
            f"The quality at tau = 0, the dense model, is {-least:.4f} below the floor. Ask for less."
        )
    most = excess(high)
    if most == least:
        warnings.warn(
            f"metric(model) is {least:+.4g} from the floor both where everything runs and where the fewest "
            "experts do. Expected a difference: metric has to run the model that it is given, without "
            "gradients, on data enough to tell.",
            CalibrationWarning,
            stacklevel=2,
        )
    if most >= 0:
        return high
    for _ in range(EVALUATIONS // 2):
        middle = (low + high) / 2
        if excess(middle) >= 0:
            low = middle
        else:
            high = middle
    return low
