"""Timing one kind of block as a model runs it: weights cold, masks skewed as real routing is.

A trial holds so many copies of a block that its weights do not stay in the cache from one pass over
them to the next, and tables of addresses (records) for each candidate, so that candidates share the
weights and can take turns.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import TuningError
from .expr import function
from .ir import Schedule
from .kernels import build, native
from .kernels.dispatch import dispatch
from .kernels.dynamic_mlp import Prepared, cpu
from .kernels.expert_mlp import expert_mlp
from .kernels.gate import tau_bits
from .kernels.native import FIELDS, Spec

DEFAULT_CACHE = 32 << 20  # bytes, where the machine does not say
COLD = 3  # times the last-level cache that all copies take together
MOST_COPIES = 64
MASKS = 32  # that take turns at one token, so that the chosen experts are not left in the cache
AUTOTUNED = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
}
CHECKED = 32  # tokens of a candidate's output that are compared with the exact answer


def last_cache() -> int:
    """Bytes of the largest cache of this machine."""
    sizes = [DEFAULT_CACHE]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) << (10 if found[2] == "K" else 20))
    return max(sizes)


def routing_masks(rows: int, experts: int, share: float, seed: int = 0) -> Tensor:
    """Random masks [rows, E] of which `share` is chosen, as skewed as real routing; at least one a row.

    Popularity of experts is log-normal (sigma 0.7), so is the number of experts a row takes (0.5).
    """
    generator = torch.Generator().manual_seed(seed)
    popularity = 0.7 * torch.randn(experts, generator=generator)
    wanted = torch.exp(0.5 * torch.randn(rows, generator=generator))
    total = max(rows, round(share * rows * experts))
    counts = _rounded(wanted, total, experts)
    noise = -torch.log(-torch.log(torch.rand(rows, experts, generator=generator)))
    ranks = (popularity + noise).argsort(1, descending=True).argsort(1)
    return ranks < counts[:, None]


def _rounded(wanted: Tensor, total: int, most: int) -> Tensor:
    """Whole numbers in 1..most in proportion to `wanted`, as far as that allows, of the given sum."""
    low, high = 0.0, float(most / wanted.min())
    for _ in range(60):
        middle = (low + high) / 2
        counts = (wanted * middle).round().clamp(1, most).long()
        low, high = (middle, high) if int(counts.sum()) < total else (low, middle)
    counts = (wanted * high).round().clamp(1, most).long()
    for i in range(len(counts)):
        spare = int(counts.sum()) - total
        counts[i] = (counts[i] - spare).clamp(1, most) if spare > 0 else counts[i]
    return counts


@dataclass(frozen=True)
class Candidate:
    """A way to run a block: a kernel's schedule, or with `everything` all experts without the router."""

    schedule: Schedule
    everything: bool = False


class Trial:
    """Copies of one kind of block with random weights and a packed copy each.

    Raises TuningError where the kind has no kernel here.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        neuron = spec.d * (2 if spec.gated else 1) + spec.out
        size = neuron * spec.experts * spec.size * (2 if spec.bf16 else 4)
        copies = max(1, min(MOST_COPIES, -(-COLD * last_cache() // size)))
        self.blocks = [self._block(seed) for seed in range(copies)]
        for block in self.blocks:
            cpu.pack(block)

    def _block(self, seed: int) -> Prepared:
        spec = self.spec
        draw = torch.Generator().manual_seed(seed)
        hidden = spec.experts * spec.size

        def matrix(rows: int, columns: int, summed: int) -> Tensor:
            drawn = torch.randn(rows, columns, generator=draw).mul_(1 / math.sqrt(summed))
            return drawn.to(self.dtype)

        block = Prepared(
            router1=matrix(spec.router, spec.d, spec.d),
            router2=matrix(spec.experts, spec.router, spec.router),
            tau=tau_bits(0.5),
            w_up=matrix(hidden, spec.d, spec.d),
            w_gate=matrix(hidden, spec.d, spec.d) if spec.gated else None,
            w_down=matrix(hidden, spec.out, hidden),
            b_up=None,
            b_gate=None,
            b_down=None,
            activation=spec.activation,
        )
        reason = cpu.refusal(block)
        if reason is not None or not cpu.fill(block):
            raise TuningError(
                f"No kernel for {spec}: {reason or 'its source does not compile here'}."
            )
        return block

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.spec.bf16 else torch.float32

    def rows(self, count: int) -> Tensor:
        """An input [count, D]."""
        draw = torch.Generator().manual_seed(1)
        return torch.randn(count, self.spec.d, generator=draw).to(self.dtype)

    def masks(self, rows: int, share: float) -> list[list[Tensor]]:
        """Masks [rows, E] for each copy that take turns."""
        turns = max(1, MASKS // rows)
        return [
            list(torch.split(routing_masks(turns * rows, self.spec.experts, share, seed), rows))
            for seed in range(len(self.blocks))
        ]

    def kernel(self, candidate: Candidate, rows: int, share: float) -> Callable[[], Tensor]:
        """A pass over all copies at an executed share; returns the first copy's output [rows, OUT]."""
        turns = self.masks(rows, share)
        x = self.rows(rows)
        outputs = [x.new_full((rows, self.spec.out), torch.nan) for _ in self.blocks]
        records = [self._record(block, candidate, rows) for block in self.blocks]
        places = [record.numpy() for record in records]
        addresses = [[mask.data_ptr() for mask in masks] for masks in turns]
        forced, numbers, run = FIELDS.index("forced"), itertools.count(), build.call()
        assert run is not None

        def once() -> Tensor:
            n = next(numbers)
            for place, record, out, masks in zip(places, records, outputs, addresses, strict=True):
                place[forced] = masks[n % len(masks)]
                run(record, x, out, x.numel())
            assert turns  # what the addresses point to
            return outputs[0]

        return once

    def _record(self, block: Prepared, candidate: Candidate, rows: int) -> Tensor:
        record = block.record.clone()
        native.write_schedule(record, candidate.schedule)
        native.write(record, forced_rows=rows, dense_rows=int(candidate.everything))
        return record

    def dense(self, rows: int, autotuned: bool = False) -> Callable[[], Tensor]:
        """A pass over all copies as the dense model runs them: in plain PyTorch, or under Inductor.

        autotuned: compiled with freezing and max-autotune, the best there is for dense blocks.
        """
        stack, x = Dense(self.blocks, self.spec.activation).eval(), self.rows(rows)
        call: Callable[[Tensor], Sequence[Tensor]] = stack
        if autotuned:
            from torch._inductor import config

            torch._dynamo.reset()  # all trials' stacks share one code object
            call = torch.compile(stack, dynamic=False, fullgraph=True)
            with torch.no_grad(), config.patch(AUTOTUNED):
                call(x)  # compiled here: Dynamo asks about freezing while it traces

        def once() -> Tensor:
            with torch.no_grad():
                return call(x)[0]

        return once

    def wrong(self, candidate: Candidate, rows: int, share: float) -> str | None:
        """What is wrong with a candidate's output on poisoned memory, or None.

        The error against fp64 may be twice that of plain PyTorch in the same dtype.
        """
        result = self.kernel(candidate, rows, share)()
        mask = self.masks(rows, 1.0 if candidate.everything else share)[0][0]
        some = torch.linspace(0, rows - 1, min(rows, CHECKED)).long()
        exact, eager = (self._meaning(rows, mask, some, t) for t in (torch.float64, self.dtype))
        if not result.isfinite().all():
            return "its output is not finite"
        error, allowed = ((y.double() - exact).norm() for y in (result[some], eager))
        least = torch.finfo(self.dtype).eps / 2 * exact.norm()
        if error > max(2 * allowed, least):
            return f"its error is {float(error):.1e}, plain PyTorch's {float(allowed):.1e}"
        return None

    def _meaning(self, rows: int, mask: Tensor, some: Tensor, dtype: torch.dtype) -> Tensor:
        block = self.blocks[0]
        weights = [None if w is None else w.to(dtype) for w in block.weights().values()]
        x, lists = self.rows(rows)[some].to(dtype), dispatch(mask[some])
        found: Tensor = expert_mlp.meaning(x, *lists, *weights, None, [], self.spec.activation)
        return found


class Dense(torch.nn.Module):
    """Blocks without experts, side by side on one input, their weights [out, in] as models keep them."""

    def __init__(self, blocks: Sequence[Prepared], activation: str) -> None:
        super().__init__()

        def parameters(weights: Iterable[Tensor]) -> torch.nn.ParameterList:
            frozen = (torch.nn.Parameter(w, requires_grad=False) for w in weights)
            return torch.nn.ParameterList(frozen)

        self.up = parameters(block.w_up for block in blocks)
        self.gate = parameters(block.w_gate for block in blocks if block.w_gate is not None)
        self.down = parameters(block.w_down.t().contiguous() for block in blocks)
        self.f = function(activation)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for i in range(len(self.up)):
            values = {"up": F.linear(x, self.up[i])}
            if len(self.gate):
                values["gate"] = F.linear(x, self.gate[i])
            found.append(F.linear(self.f(values), self.down[i]))
        return found
