"""sample: a uniform random sample of a stream of rows, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sample:
    """A uniform random sample of a stream of rows, at most `limit` of them, in bounded memory.

    Each row draws a random key and the rows with the smallest keys are kept: whatever the batch sizes,
    every row of the stream is equally likely to be in the sample.
    """

    limit: int
    generator: torch.Generator
    seen: int = 0
    _parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, x: Tensor, targets: Tensor) -> None:
        """Offer rows x [n, D] with targets [n, E]."""
        keys = torch.rand(len(x), generator=self.generator)
        self.seen += len(x)
        self._parts.append((keys, x.cpu().clone(), targets.cpu()))
        if sum(len(part[0]) for part in self._parts) > 1.5 * self.limit:
            self._shrink()

    def restrict(self, limit: int) -> None:
        """Keep no more than so many rows from now on: those of the smallest keys, still a uniform sample."""
        self.limit = min(self.limit, limit)
        if sum(len(part[0]) for part in self._parts) > 1.5 * self.limit:
            self._shrink()

    def rows(self) -> tuple[Tensor, Tensor]:
        """The sample: x [n, D] and targets [n, E], n = min(limit, rows seen)."""
        self._shrink()
        return self._parts[0][1], self._parts[0][2]

    def _shrink(self) -> None:
        keys, x, targets = (torch.cat(part) for part in zip(*self._parts, strict=True))
        kept = keys.argsort()[: self.limit].sort().values
        self._parts = [(keys[kept], x[kept], targets[kept])]
