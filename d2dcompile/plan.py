"""plan: how many experts of how many neurons a site is split into."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import replace
from fnmatch import fnmatchcase

from .config import Config
from .errors import PlanError
from .ir import Plan, Site

MANY = 512  # experts, where only small ones divide: their router would cost more than they save


def plan(site: Site, config: Config) -> Plan | str:
    """The split of a site, or the reason why it stays dense.

    With `config.experts` given it must divide the hidden size, else PlanError. Without, the expert
    size is the divisor of the hidden size nearest to `config.expert_size`, at most a factor of two
    away, with at least two experts; blocks under four times that size get four experts or so. A hidden
    size without such a divisor, a prime for one, gets the largest below it, MANY experts at most. A site
    whose experts would all be shared stays dense.
    """
    hidden = site.d_hidden
    if config.experts is not None:
        if hidden % config.experts:
            near = [e for e in _divisors(hidden) if e <= 2 * config.experts]
            raise PlanError(
                f"Site {site.name!r} has {hidden} hidden neurons, which {config.experts} experts do "
                f"not divide equally. Choose a divisor, such as {near[-1]}, or leave Config.experts "
                "at None and set Config.expert_size."
            )
        if config.shared_experts >= config.experts:
            raise PlanError(
                f"shared_experts is {config.shared_experts} of {config.experts} experts; expected fewer, so "
                "that some are chosen."
            )
        return _planned(config.experts, hidden, config)
    return sized(hidden, config)


def excluding(name: str, config: Config) -> list[str]:
    """The patterns of `Config.exclude` that a site's name fits."""
    return [pattern for pattern in config.exclude if fnmatchcase(name, pattern)]


def sized(hidden: int, config: Config) -> Plan | str:
    """The split of so many hidden neurons by `config.expert_size`, as `plan` says, or why there is none."""
    target = min(config.expert_size, max(1, hidden // 4))
    divisors = [f for f in _divisors(hidden) if f < hidden]
    fits = [f for f in divisors if target / 2 <= f <= 2 * target]
    fits = fits or [f for f in divisors if f < target and hidden // f <= MANY][-1:]
    if not fits:
        return f"its {hidden} hidden neurons have no divisor near the expert size {target}"
    size = min(fits, key=lambda f: (abs(math.log(f / target)), f))
    if config.shared_experts >= hidden // size:
        return f"all of its {hidden // size} experts would be shared ones"
    return _planned(hidden // size, hidden, config)


def _planned(experts: int, hidden: int, config: Config) -> Plan:
    """The plan of so many experts; a router of centroids has one hidden unit for each."""
    width = experts if config.router == "centroid" else config.router_width
    return Plan(experts, hidden // experts, width)


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def with_own_name(site: Site, taken: Set[str]) -> Site:
    """The site; where one of another graph has its name already, by its first weight's path."""
    if site.name not in taken:
        return site
    return replace(site, name=next(iter(site.params.values())).removesuffix(".weight"))


def key_of(site: Site) -> tuple[str, ...]:
    """What identifies a site whatever graph it is met in: the names of its weights."""
    return tuple(site.params.values())
