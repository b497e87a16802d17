"""How far a model's output with some experts skipped is from the dense one, and what it cost.

    logits      KL(dense || sparse), nats, mean over positions
    others      |sparse - dense|^2 / |dense|^2 of the first floating-point tensor of the output

Positions that the batch's attention_mask leaves out count in neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .errors import BudgetError
from .measuring import Measuring
from .probe import arguments, probing
from .setting import set_numbers

Distance = Callable[[Any, Any], float]
"""(output, dense output) -> how far apart they are, >= 0."""


@dataclass
class Outcome:
    """What one setting of taus came to: harm, mean distance over batches; macs of the sites, routers too."""

    harm: float = 0.0
    macs: int = 0


def survey(
    model: nn.Module,
    batches: Sequence[Any],
    settings: Sequence[Mapping[str, float]],
    distance: Distance | None = None,
) -> list[Outcome]:
    """Run every setting {site name: tau} on every batch, beside one dense run of the batch.

    len(batches) * (1 + len(settings)) forward passes; only one batch's outputs are held at a time. Leaves
    the last setting set. Raises BudgetError where the outputs hold nothing to compare.
    """
    found = [Outcome() for _ in settings]
    observer = Measuring(flops=False)
    with probing(model, observer) as call:
        for batch in batches:
            args, kwargs = arguments(batch)
            observer.dense = True
            exact = call(*args, **kwargs)
            observer.dense = False
            for outcome, setting in zip(found, settings, strict=True):
                set_numbers(model, setting)
                before = _macs(observer)
                output = call(*args, **kwargs)
                outcome.macs += _macs(observer) - before
                far = distance(output, exact) if distance else default(output, exact, kwargs)
                outcome.harm += float(far) / len(batches)
    return found


def _macs(observer: Measuring) -> int:
    return sum(site.macs for site in observer.stats.sites.values())


def default(output: Any, exact: Any, batch: Mapping[str, Any]) -> float:
    """The distance that the module describes, of outputs of one batch of keyword arguments."""
    logits, dense = _logits(output), _logits(exact)
    if isinstance(logits, Tensor) and isinstance(dense, Tensor) and logits.shape[-1] > 1:
        mask = _mask(batch, dense)
        p, q = (t[mask].float().log_softmax(-1) for t in (dense, logits))
        return float((p.exp() * (p - q)).sum() / max(p[..., 0].numel(), 1))
    first, other = next(_floats(exact), None), next(_floats(output), None)
    if first is None or other is None:
        raise BudgetError(
            f"The model returns a {type(exact).__name__} without a floating-point tensor; expected one "
            "to compare with the dense output. Pass distance=callable(output, dense_output)."
        )
    mask = _mask(batch, first)
    a, b = other[mask].double(), first[mask].double()
    return float((a - b).square().sum() / b.square().sum().clamp_min(1e-30))


def _logits(output: Any) -> Any:
    """`.logits` or ["logits"] of an output, or None."""
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def _mask(batch: Mapping[str, Any], output: Tensor) -> Any:
    """Which positions of an output [B, T, ...] count: all, or those of the batch's attention mask."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and output.dim() == 3 and mask.shape == output.shape[:2]:
        return mask.bool()
    return ...


def _floats(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a nested output, in order, without scalars: those are losses."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.dim():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _floats(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _floats(inner)
