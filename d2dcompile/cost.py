"""Roofline times of a feed-forward block on a GPU, dense and as dynamic-k experts: where does it pay?

A kernel takes its launch plus the longest of: its arithmetic, its bytes from memory, its bytes from L2, and
the shortest time any kernel takes. Weights count once per call, those of experts no token chose not at all.
Times are seconds in a CUDA graph; a model, to rank and to decide what to measure, not a measurement.

    T tokens   D, O features of x and y   H = E F hidden   P = T E share pairs of a token and its expert
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .gpus import BYTES, Gpu
from .load import Block, Load, union_share

DECODE_TOKENS, UNION_TOKENS = 8, 64  # up to which each strategy has a kernel
PAIR_BYTES = 8  # a pair's entries in its expert's list and in its token's


def kernel_time(
    gpu: Gpu, *, dram: float = 0.0, l2: float = 0.0, flops: float = 0.0, rate: float = 1.0
) -> float:
    """A kernel's seconds from its bytes from memory and from L2, and its FLOPs at a rate."""
    busy = max(dram / gpu.bandwidth(), l2 / gpu.l2_rate, flops / rate)
    return gpu.launch + max(gpu.floor, busy)


def dense_time(gpu: Gpu, block: Block, tokens: int) -> float:
    """Seconds of the dense block: one product for up and gate, one for down."""
    rate = gpu.rate(block.dtype, gpu.dense_fraction)
    x, h, y = (tokens * n * block.value for n in (block.d, block.hidden, block.out))
    pairs = tokens * block.hidden
    up = kernel_time(
        gpu, dram=x + h + block.up_bytes, flops=2 * pairs * block.d * block.ups, rate=rate
    )
    down = kernel_time(gpu, dram=h + y + block.down_bytes, flops=2 * pairs * block.out, rate=rate)
    return up + down


def router_time(gpu: Gpu, block: Block, load: Load) -> float:
    """Seconds of the router, the choice and the lists, one kernel."""
    weights = block.router * (block.d + block.experts)
    lists = load.tokens * block.experts * load.share * PAIR_BYTES
    return kernel_time(
        gpu,
        dram=(load.tokens * block.d + weights) * block.value + lists,
        flops=2 * load.tokens * weights,
        rate=gpu.rate(block.dtype, gpu.moe_fraction),
    )


def decode_time(gpu: Gpu, block: Block, load: Load) -> float:
    """Seconds for a few tokens: router, then one kernel that streams every chosen expert once.

    Every token is multiplied with every expert of the union, without tensor cores.
    """
    weights = load.used * sum(block.streamed)
    rate = gpu.rate("fp32", gpu.dense_fraction)
    flops = 2 * load.tokens * load.used * (block.up_bytes + block.down_bytes) / block.value
    values = load.tokens * (block.d + block.out) * block.value
    return router_time(gpu, block, load) + kernel_time(
        gpu, dram=weights + values, flops=flops, rate=rate
    )


def union_time(gpu: Gpu, block: Block, load: Load) -> float:
    """Seconds for some tens of tokens: router, up and down over the union, all tokens with each expert."""
    tokens, used = load.tokens, load.used
    rate = gpu.rate(block.dtype, gpu.moe_fraction)
    neurons = tokens * used * block.hidden
    x, h, y = (n * block.value for n in (tokens * block.d, neurons, tokens * block.out))
    of_up, of_down = block.streamed
    up = kernel_time(
        gpu,
        dram=used * of_up + x + h,
        flops=2 * neurons * block.d * block.ups,
        rate=rate,
    )
    down = kernel_time(gpu, dram=used * of_down + h + y, flops=2 * neurons * block.out, rate=rate)
    return router_time(gpu, block, load) + up + down


def up_time(gpu: Gpu, block: Block, load: Load, extra: float = 0.0) -> float:
    """Seconds of up over lists: rows gathered, hidden values of pairs stored; extra: more bytes it writes."""
    neurons = load.tokens * load.share * block.hidden
    pairs = load.tokens * load.share * block.experts
    return kernel_time(
        gpu,
        dram=load.used * block.up_bytes + (load.tokens * block.d + neurons) * block.value + extra,
        l2=pairs * block.d * block.value,
        flops=2 * neurons * block.d * block.ups,
        rate=gpu.rate(block.dtype, gpu.moe_fraction),
    )


def pairs_time(gpu: Gpu, block: Block, load: Load, chunks: int = 1) -> float:
    """Seconds for many tokens: router, up, down into a row per pair, combined per token in fixed order.

    chunks: of the columns of y, combined one after another so that their pair rows may stay in L2, which
    they do while they fill at most half of it.
    """
    neurons = load.tokens * load.share * block.hidden
    rows = load.tokens * load.share * block.experts * block.out * block.value / chunks
    y = load.tokens * block.out * block.value / chunks
    stays = rows <= gpu.l2 / 2
    dram, l2 = (0.0, rows) if stays else (rows, 0.0)
    down = kernel_time(
        gpu,
        dram=load.used * block.down_bytes / chunks + neurons * block.value + dram,
        l2=l2,
        flops=2 * neurons * block.out / chunks,
        rate=gpu.rate(block.dtype, gpu.moe_fraction),
    )
    combine = kernel_time(gpu, dram=dram + y, l2=l2)
    return router_time(gpu, block, load) + up_time(gpu, block, load) + chunks * (down + combine)


def atomics_time(gpu: Gpu, block: Block, load: Load, cast: bool = True) -> float:
    """Seconds for many tokens with down adding its rows to an fp32 y, which up clears, in any order.

    cast: whether a kernel then turns y into the block's dtype.
    """
    neurons = load.tokens * load.share * block.hidden
    y = load.tokens * block.out * BYTES["fp32"]
    added = load.tokens * load.share * block.experts * block.out * BYTES["fp32"]
    down = kernel_time(
        gpu,
        dram=load.used * block.down_bytes + neurons * block.value,
        l2=added / (gpu.atomic_fraction * gpu.dram) * gpu.l2_rate,
        flops=2 * neurons * block.out,
        rate=gpu.rate(block.dtype, gpu.moe_fraction),
    )
    total = router_time(gpu, block, load) + up_time(gpu, block, load, extra=y) + down
    if cast and block.value != BYTES["fp32"]:
        total += kernel_time(gpu, dram=y + load.tokens * block.out * block.value)
    return total


Strategy = Callable[[Gpu, Block, Load], float]
STRATEGIES: Mapping[str, Strategy] = {
    "decode": decode_time,
    "union": union_time,
    "pairs": pairs_time,
    "atomics": atomics_time,
}
LIMITS = {"decode": DECODE_TOKENS, "union": UNION_TOKENS}


def moe_times(
    gpu: Gpu, block: Block, load: Load, strategies: Mapping[str, Strategy] = STRATEGIES
) -> dict[str, float]:
    """Seconds by every strategy that has a kernel for so many tokens, fastest first."""
    fit = [name for name in strategies if load.tokens <= LIMITS.get(name, load.tokens)]
    times = {name: strategies[name](gpu, block, load) for name in fit}
    return dict(sorted(times.items(), key=lambda item: item[1]))


def moe_time(
    gpu: Gpu, block: Block, load: Load, strategies: Mapping[str, Strategy] = STRATEGIES
) -> float:
    """Seconds by the fastest strategy."""
    return min(moe_times(gpu, block, load, strategies).values())


def break_even(
    gpu: Gpu,
    block: Block,
    tokens: int,
    union: Callable[[float, int], float] = union_share,
    strategies: Mapping[str, Strategy] = STRATEGIES,
) -> float:
    """The executed share above which the dense block is faster; 0: from the start, 1: never.

    union: (share, tokens) -> share of experts that some token chose, rising with the share; give the
    relation measured on a model whose tokens do not choose independently.
    """
    dense = dense_time(gpu, block, tokens)

    def pays(share: float) -> bool:
        return moe_time(gpu, block, Load(tokens, share, union(share, tokens)), strategies) <= dense

    if not pays(0.0):
        return 0.0
    low, high = 0.0, 1.0
    if pays(high):
        return 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low
