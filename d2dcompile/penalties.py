"""Penalties on hidden activations that make them sparse: a [..., H] -> one number per token.

    Hoyer      (sum |a|)^2 / (H sum a^2)     square Hoyer: of 0/1 vectors, the share that is 1
    L1         sum |a| / H
    Clamped    either of them on max(p, c) - c, for pre-activations p that are pushed down to c

All are divided by the width H, so that one weight means the same at every width; the official code of
D2DMoE divides by none, its weight alpha is alpha * H here. Any other callable of that shape is a penalty
too; with a method `gradient(a)`, the derivative of the sum over tokens, autograd is not asked for it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .errors import SparsifyError

DEAD = 1e-15  # a token with a smaller sum of squares has no direction; the official code's epsilon


class Penalty(Protocol):
    """A penalty with a closed gradient; `at` is what it is meant for, unless told otherwise."""

    @property
    def at(self) -> str: ...

    def __call__(self, a: Tensor, /) -> Tensor: ...

    def gradient(self, a: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Hoyer:
    """Square Hoyer over the width, (sum |a|)^2 / (H sum a^2): 1/H for one neuron, 1 for all alike.

    It does not change with the scale of `a`, so its gradient has no part along `a`. A dead token, all
    zero, counts as one active neuron and has no gradient: nothing is won by killing tokens, whereas the
    usual epsilon in the denominator makes zero the best value of all.
    """

    at: ClassVar[str] = "activation"

    def __call__(self, a: Tensor) -> Tensor:
        """The penalty of each token: a [..., H] -> [...]."""
        total, squares = a.abs().sum(-1), a.square().sum(-1)
        value = total.square() / (a.shape[-1] * squares.clamp_min(DEAD))
        return torch.where(squares > DEAD, value, 1 / a.shape[-1])

    def gradient(self, a: Tensor) -> Tensor:
        """The derivative of the sum over tokens: [..., H] like `a`."""
        total, squares = a.abs().sum(-1, keepdim=True), a.square().sum(-1, keepdim=True)
        ratio = torch.where(squares > DEAD, total / squares.clamp_min(DEAD), 0)
        return (a.sign() - ratio * a) * (2 / a.shape[-1] * ratio)


@dataclass(frozen=True)
class L1:
    """Mean of |a| over the width."""

    at: ClassVar[str] = "activation"

    def __call__(self, a: Tensor) -> Tensor:
        """The penalty of each token: a [..., H] -> [...]."""
        return a.abs().mean(-1)

    def gradient(self, a: Tensor) -> Tensor:
        """The derivative of the sum over tokens: [..., H] like `a`."""
        return a.sign() / a.shape[-1]


@dataclass(frozen=True)
class Clamped:
    """A penalty on max(p, floor) - floor: pushes pre-activations down to where GELU or SiLU is nothing.

    Attributes:
        inner: the penalty of the clamped values.
        floor: c, -10 in the official code.
    """

    inner: Penalty = field(default_factory=L1)
    floor: float = -10.0
    at: ClassVar[str] = "preactivation"

    def __call__(self, p: Tensor) -> Tensor:
        """The penalty of each token: p [..., H] -> [...]."""
        return self.inner((p - self.floor).clamp_min(0))

    def gradient(self, p: Tensor) -> Tensor:
        """The derivative of the sum over tokens: [..., H] like `p`."""
        return self.inner.gradient((p - self.floor).clamp_min(0)) * (p > self.floor)


PENALTIES: dict[str, Penalty] = {
    "hoyer": Hoyer(),
    "l1": L1(),
    "clamped_hoyer": Clamped(Hoyer()),
    "clamped_l1": Clamped(L1()),
}


def penalty_of(given: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The penalty of a name, or the callable itself. Raises SparsifyError for unknown names."""
    if isinstance(given, str) and given in PENALTIES:
        return PENALTIES[given]
    if not callable(given):
        raise SparsifyError(
            f"penalty is {given!r}; expected one of {', '.join(PENALTIES)}, or a function from "
            "activations [..., H] to one number per token [...]."
        )
    return given


def value(penalty: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """The mean penalty of tokens a [..., H], at least in fp32."""
    return penalty(wide(a)).mean()


def gradient(penalty: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """The derivative of the sum of a penalty over tokens a [..., H], at least in fp32."""
    closed: Callable[[Tensor], Tensor] | None = getattr(penalty, "gradient", None)
    return closed(wide(a)) if closed is not None else _by_autograd(penalty, wide(a))


def wide(a: Tensor) -> Tensor:
    """The values in fp32, or in fp64 if they are that: sums over a width overflow fp16."""
    return a if a.dtype == torch.float64 else a.float()


def _by_autograd(penalty: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """The gradient of any penalty, in a thread of its own: autograd is off where custom ops run."""
    stream = torch.cuda.current_stream(a.device) if a.is_cuda else None

    def derive() -> Tensor:
        with torch.cuda.stream(stream), torch.enable_grad():
            at = a.detach().requires_grad_()
            per_token: Any = penalty(at)
            if not isinstance(per_token, Tensor) or per_token.shape != a.shape[:-1]:
                shape = list(getattr(per_token, "shape", [])) or type(per_token).__name__
                raise SparsifyError(
                    f"The penalty of activations of shape {list(a.shape)} is {shape}; expected one "
                    f"number per token, {list(a.shape[:-1])}."
                )
            return torch.autograd.grad(per_token.sum(), at)[0]

    with ThreadPoolExecutor(max_workers=1) as worker:
        return worker.submit(derive).result()
