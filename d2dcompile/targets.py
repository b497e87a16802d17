"""What a tuning run is about: the distinct kinds of blocks of a model, a conversion, or as given."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from .attachment import attached
from .errors import TuningError
from .ir import Conversion, Experts
from .kernels import native
from .kernels.native import Spec

Target = nn.Module | Conversion | Iterable[Spec]


def kinds_of(
    target: Target,
    dtypes: Sequence[torch.dtype],
    known: Collection[torch.dtype],
    usual: Sequence[torch.dtype],
) -> list[tuple[Spec, torch.dtype]]:
    """The distinct (kind of block, dtype to run it in) of a target, in its order.

    dtypes: those asked for; without, a model's weights' own, `usual` of a conversion, a Spec's own.
    known: those that there are kernels for; blocks of a model in others are left out.

    Raises NoConversionError for a model without an attached conversion, TuningError for unknown dtypes.
    """
    if bad := [dtype for dtype in dtypes if dtype not in known]:
        raise TuningError(
            f"There are kernels for {_named(known)} on that device; asked for {_named(bad)}."
        )
    if isinstance(target, nn.Module):
        found: list[tuple[Experts, Sequence[torch.dtype]]] = [
            (state.experts, dtypes or [state.weight("down").dtype]) for state in attached(target)
        ]
    elif isinstance(target, Conversion):
        found = [(experts, dtypes or usual) for experts in target.experts.values()]
    else:
        given = [(spec, dtypes or [_dtype(spec)]) for spec in target]
        every = [(replace(s, bf16=d == torch.bfloat16), d) for s, wanted in given for d in wanted]
        return list(dict.fromkeys(every))
    pairs = [
        (native.spec_of(experts, dtype), dtype)
        for experts, wanted in found
        for dtype in wanted
        if dtype in known
    ]
    return list(dict.fromkeys(pairs))


def _dtype(spec: Spec) -> torch.dtype:
    return torch.bfloat16 if spec.bf16 else torch.float32


def _named(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
