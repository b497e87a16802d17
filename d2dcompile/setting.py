"""Set what attached sites choose their experts by: thresholds, other rules and their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .attachment import attached, states
from .capture import unwrap
from .config import check_tau
from .errors import RuleError, TauError
from .rules import check_rule, check_value
from .state import State


def set_tau(model: nn.Module, tau: float | Mapping[str, float]) -> None:
    """Set the threshold of all sites, or of those named, without recompiling anything.

    tau: 0 runs every expert (the dense model), larger is sparser, at most 1; or {site name: tau}.

    Raises TauError for values that are not finite numbers in 0..1, unknown site names, sites that follow
    another rule (see `set_rule`), and a model without an attached conversion. Nothing is changed when an
    error is raised.
    """
    known = _by_name(states(model))
    if not known:
        raise TauError(
            f"This {type(unwrap(model)).__name__} has no attached conversion; expected one. "
            "Call convert(model, batches) or load(folder).attach(model) first."
        )
    wanted = dict(tau) if isinstance(tau, Mapping) else dict.fromkeys(known, tau)
    for name, value in wanted.items():
        if name not in known:
            raise TauError(f"No site {name!r}; expected one of {', '.join(known)}.")
        check_tau(value)
        for state in known[name]:
            state.check_has_tau()
    for name, value in wanted.items():
        for state in known[name]:
            state.set_value(float(value))


def _by_name(held: Sequence[State]) -> dict[str, list[State]]:
    """Sites by name: parts of a model that were converted apart may have equal ones."""
    found: dict[str, list[State]] = {}
    for state in held:
        found.setdefault(state.site.name, []).append(state)
    return found


def set_numbers(model: nn.Module, setting: Mapping[str, float]) -> None:
    """Set {site name: number} of whatever rule each site follows: tau, k or p. Raises as `set_rule`."""
    known = _by_name(states(model))
    for name, number in setting.items():
        for state in known[name]:
            state.set_value(check_value(state.rule, number))


def set_rule(model: nn.Module, rule: str, value: float | Mapping[str, float]) -> None:
    """Let all sites, or those named, choose their experts by a rule with this number.

    rule: "max" (value is tau, 0 runs everything), "top_k" (the number of experts, E or more run
    everything) or "top_p" (the share of the scores' sum, 1 runs everything); see `kernels.gate`. value: a
    number, or {site name: number}. Another number under the same rule recompiles nothing. Another rule
    makes torch.compile forget its graphs, so that the next call compiles them anew; kernels that run a
    whole block know "max" only, others run as separate ops.

    Raises RuleError (TauError for a tau) for an unknown rule, a number that it cannot have and unknown
    site names, and NoConversionError for a model without a conversion. Nothing is changed then.
    """
    known = _by_name(attached(model))
    check_rule(rule)
    wanted = dict(value) if isinstance(value, Mapping) else dict.fromkeys(known, value)
    for name, number in wanted.items():
        if name not in known:
            raise RuleError(f"No site {name!r}; expected one of {', '.join(known)}.")
        check_value(rule, number)
    changed = any(state.rule != rule for name in wanted for state in known[name])
    for name, number in wanted.items():
        for state in known[name]:
            state.rule = rule
            state.set_value(float(number))
    if changed:
        torch.compiler.reset()
