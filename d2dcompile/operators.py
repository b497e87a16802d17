"""The elementwise operators that an activation may be made of, one table for all readers.

The matcher looks a graph's calls up here by name, expressions are evaluated with the functions, and code
generators give each name a spelling in their language.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Operator:
    """One elementwise operator: its torch function, its parameters in order, and its defaults.

    spelling: how generated code says it, in C++ and in Triton: a function of kernels/cpu/vec.h and of
    kernels/gpu/math.py that takes operands and then parameters, or an expression with {} for each
    operand; {name} in either is a parameter that is a text. "" if it has none.
    """

    call: Callable[..., Tensor]
    tensors: int = 1
    params: tuple[str, ...] = ()
    defaults: tuple[Any, ...] = ()
    nonlinear: bool = True
    spelling: str = ""


def _op(
    call: Callable[..., Tensor],
    spelling: str,
    tensors: int = 1,
    linear: bool = False,
    **params: Any,
) -> Operator:
    return Operator(call, tensors, tuple(params), tuple(params.values()), not linear, spelling)


def _cast(x: Tensor, dtype: str) -> Tensor:
    return x.to(getattr(torch, dtype))


def _pair(a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    """Two operands as tensors: torch.maximum takes no numbers."""
    like = a if isinstance(a, Tensor) else b
    assert isinstance(like, Tensor)
    first, second = (t if isinstance(t, Tensor) else like.new_full((), t) for t in (a, b))
    return first, second


def _maximum(a: Tensor | float, b: Tensor | float) -> Tensor:
    return torch.maximum(*_pair(a, b))


def _minimum(a: Tensor | float, b: Tensor | float) -> Tensor:
    return torch.minimum(*_pair(a, b))


OPERATORS: dict[str, Operator] = {
    # The usual activations.
    "relu": _op(F.relu, "relu"),
    "relu6": _op(F.relu6, "relu6"),
    "gelu": _op(F.gelu, "gelu_{approximate}", approximate="none"),
    "silu": _op(F.silu, "silu"),
    "sigmoid": _op(torch.sigmoid, "sigmoid"),
    "tanh": _op(torch.tanh, "tanh"),
    "mish": _op(F.mish, "mish"),
    "softplus": _op(F.softplus, "softplus", beta=1.0, threshold=20.0),
    "softsign": _op(F.softsign, "softsign"),
    "logsigmoid": _op(F.logsigmoid, "logsigmoid"),
    "leaky_relu": _op(F.leaky_relu, "leaky_relu", negative_slope=0.01),
    "elu": _op(F.elu, "elu", alpha=1.0),
    "selu": _op(F.selu, "selu"),
    "celu": _op(F.celu, "celu", alpha=1.0),
    "hardtanh": _op(F.hardtanh, "hardtanh", min_val=-1.0, max_val=1.0),
    "hardswish": _op(F.hardswish, "hardswish"),
    "hardsigmoid": _op(F.hardsigmoid, "hardsigmoid"),
    "hardshrink": _op(F.hardshrink, "hardshrink", lambd=0.5),
    "softshrink": _op(F.softshrink, "softshrink", lambd=0.5),
    "tanhshrink": _op(F.tanhshrink, "tanhshrink"),
    "threshold": _op(F.threshold, "threshold", threshold=None, value=None),
    "prelu": _op(F.prelu, "prelu", 2),
    # What activations are spelt with.
    "exp": _op(torch.exp, "exp"),
    "expm1": _op(torch.expm1, "expm1"),
    "log": _op(torch.log, "log"),
    "log1p": _op(torch.log1p, "log1p"),
    "sqrt": _op(torch.sqrt, "sqrt"),
    "rsqrt": _op(torch.rsqrt, "rsqrt"),
    "reciprocal": _op(torch.reciprocal, "reciprocal"),
    "erf": _op(torch.erf, "erf"),
    "sin": _op(torch.sin, "sin"),
    "cos": _op(torch.cos, "cos"),
    "abs": _op(torch.abs, "abs"),
    "square": _op(torch.square, "square"),
    "sign": _op(torch.sign, "sign"),
    "pow": _op(operator.pow, "pow", 2),
    "clamp": _op(torch.clamp, "clamp", min=None, max=None),
    "maximum": _op(_maximum, "maximum", 2),
    "minimum": _op(_minimum, "minimum", 2),
    "where": _op(torch.where, "where", 3),
    "gt": _op(operator.gt, "{} > {}", 2),
    "ge": _op(operator.ge, "{} >= {}", 2),
    "lt": _op(operator.lt, "{} < {}", 2),
    "le": _op(operator.le, "{} <= {}", 2),
    # Linear ones: alone they make no activation.
    "neg": _op(operator.neg, "-{}", linear=True),
    "add": _op(operator.add, "{} + {}", 2, linear=True),
    "sub": _op(operator.sub, "{} - {}", 2, linear=True),
    "mul": _op(operator.mul, "{} * {}", 2, linear=True),
    "div": _op(operator.truediv, "{} / {}", 2, linear=True),
    "cast": _op(_cast, "{}", linear=True, dtype=None),
}
