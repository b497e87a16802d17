"""What a case of the universe is: a model, one call of it, and the truth about its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Truth:
    """What a matcher has to find in a model, by the names of weights; biases are not listed.

    Attributes:
        blocks: each feed-forward block as {role: weight name}; roles are "up", "gate", "gate_up", "down".
        projections: {weight name: role} with role one of q, k, v, o, qk, kv, qkv.
        optional: weights which may be reported as either or not at all: position projections, adapters,
            squeeze-and-excite, shared experts, and the like. Any other weight must not be reported.
    """

    blocks: tuple[Mapping[str, str], ...] = ()
    projections: Mapping[str, str] = ()  # type: ignore[assignment]
    optional: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Case:
    """One model of the universe.

    Attributes:
        name: unique, "<group>/<model>", e.g. "hf/bert", "nn/encoder_layer", "form/einsum_ffn".
        make: builds (model in eval mode, arguments of one call), seeded: a tuple is positional, a dict
            keyword arguments.
        truth: from the model's modules and parameter names.
        note: why the truth is what it is, where that is not plain.
    """

    name: str
    make: Callable[[], tuple[nn.Module, tuple[Any, ...] | dict[str, Any]]]
    truth: Callable[[nn.Module], Truth]
    note: str = ""
