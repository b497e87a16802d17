"""What the cost model is asked about: the sizes of a block, and what one call of it computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import TuningError
from .gpus import BYTES

if TYPE_CHECKING:
    from .kernels.native import Spec

SCALE = 4  # bytes


@dataclass(frozen=True)
class Block:
    """Sizes of a block: d, out features; hidden neurons in experts; the router's width; see `gpus.BYTES`.

    int8: whether few tokens read an int8 copy of the weights, with a scale a row.

    Raises TuningError for sizes that are not a block.
    """

    d: int
    out: int
    hidden: int
    experts: int
    router: int
    gated: bool
    dtype: str = "bf16"
    int8: bool = False

    def __post_init__(self) -> None:
        sizes = (self.d, self.out, self.hidden, self.experts, self.router)
        if min(sizes) < 1 or self.hidden % self.experts or self.dtype not in BYTES:
            raise TuningError(
                f"{self} is no block; expected sizes of at least 1, experts that divide hidden, and a "
                f"dtype of {', '.join(BYTES)}."
            )

    @classmethod
    def of(cls, spec: Spec) -> Block:
        """The block that a kind of generated kernel computes."""
        hidden, dtype = spec.experts * spec.size, "bf16" if spec.bf16 else "fp32"
        return cls(spec.d, spec.out, hidden, spec.experts, spec.router, spec.gated, dtype)

    @property
    def size(self) -> int:
        """Neurons of an expert."""
        return self.hidden // self.experts

    @property
    def value(self) -> int:
        """Bytes of a value."""
        return BYTES[self.dtype]

    @property
    def ups(self) -> int:
        """How many matrices read x."""
        return 2 if self.gated else 1

    @property
    def up_bytes(self) -> int:
        return self.ups * self.d * self.hidden * self.value

    @property
    def down_bytes(self) -> int:
        return self.hidden * self.out * self.value

    @property
    def streamed(self) -> tuple[int, int]:
        """Bytes of up and down matrices as few tokens read them."""
        if not self.int8:
            return self.up_bytes, self.down_bytes
        return self.ups * self.hidden * (self.d + SCALE), self.hidden * (self.out + SCALE)


def union_share(share: float, tokens: int) -> float:
    """The share of experts that some token chose, if tokens choose independently: 1 - (1 - share)^T."""
    if share >= 1 or tokens == 1:
        return share
    return max(share, -math.expm1(tokens * math.log1p(-share)))


@dataclass(frozen=True)
class Load:
    """What a call computes.

    Attributes:
        tokens: rows of x.
        share: mean part of the experts that a token chose, 0..1.
        union: part that some token chose, as measured; independent choices without it.

    Raises TuningError for values that no call has.
    """

    tokens: int
    share: float
    union: float | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0 <= self.share <= 1 or not self.share <= self.used <= 1:
            raise TuningError(
                f"{self} is no load; expected tokens >= 1 and 0 <= share <= union <= 1."
            )

    @property
    def used(self) -> float:
        return union_share(self.share, self.tokens) if self.union is None else self.union

    @property
    def rows(self) -> float:
        """Mean rows of an expert that has any."""
        return self.tokens * self.share / self.used if self.used else 0.0
