"""Cost model: the table it was derived from, its laws, occupancy as compiled kernels showed it, tiles."""

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2dcompile import cost, tiles
from d2dcompile.errors import TuningError
from d2dcompile.gpu_blocks import GpuSpec
from d2dcompile.gpu_defaults import of_strategy
from d2dcompile.gpus import A100, GPUS, H200
from d2dcompile.kernels.native import Spec
from d2dcompile.load import Block, Load
from d2dcompile.tiles import Gemm, Tile

SMALL = Block(768, 768, 3072, 24, 128, gated=False)
MIDDLE = Block(2048, 2048, 8192, 64, 128, gated=False)
LLAMA = Block(4096, 4096, 11008, 86, 128, gated=True)
MISTRAL = Block(4096, 4096, 14336, 112, 128, gated=True)
SHARES = (0.05, 0.1, 0.25, 0.5)
# {block: {tokens: (dense microseconds, speedups at SHARES)}}, computed independently for an H200 with
# every byte from memory; kernels of a pair of strategies, see `published`.
TABLE = {
    SMALL: {
        1: (6.0, (1.0, 1.0, 1.0, 1.0)),
        8: (6.0, (0.67, 0.67, 0.67, 0.67)),
        64: (6.0, (0.67, 0.67, 0.67, 0.67)),
        512: (9.9, (1.05, 1.04, 0.90, 0.65)),
        4096: (62, (3.4, 2.7, 1.54, 0.84)),
        50432: (737, (4.7, 3.1, 1.59, 0.87)),
    },
    MIDDLE: {
        1: (21, (3.5, 3.3, 2.3, 1.5)),
        8: (21, (1.8, 1.3, 0.95, 0.88)),
        64: (22, (0.92, 0.89, 0.89, 0.88)),
        512: (55, (2.1, 2.0, 1.34, 0.78)),
        4096: (427, (5.9, 3.6, 1.7, 0.91)),
        50432: (5227, (6.9, 4.0, 1.8, 0.93)),
    },
    LLAMA: {
        1: (76, (9.3, 6.4, 3.3, 1.8)),
        8: (77, (2.5, 1.6, 1.06, 0.97)),
        64: (78, (1.0, 0.97, 0.96, 0.96)),
        512: (216, (2.5, 2.5, 1.5, 0.90)),
        4096: (1713, (7.4, 4.4, 2.0, 1.05)),
        50432: (21064, (8.8, 4.9, 2.1, 1.07)),
    },
    MISTRAL: {
        1: (99, (10.5, 7.0, 3.5, 1.9)),
        8: (99, (2.6, 1.6, 1.07, 0.97)),
        64: (100, (1.0, 0.98, 0.97, 0.97)),
        512: (281, (2.6, 2.6, 1.5, 0.90)),
        4096: (2230, (7.7, 4.5, 2.0, 1.05)),
        50432: (27431, (9.2, 5.0, 2.1, 1.07)),
    },
}
# The table charges many tokens one more pass over y, a quarter of the time where experts cost least.
BEYOND = {(SMALL, 50432, 0.05): 0.25}
FLAT = replace(H200, l2=0)  # the table's pair rows never stay in L2

blocks = st.sampled_from([SMALL, MIDDLE, LLAMA, MISTRAL, replace(SMALL, dtype="fp32", out=512)])
gpus = st.sampled_from([*GPUS.values()])
shares = st.floats(0, 1)
rows = st.integers(1, 1 << 17)


def published(block: Block, tokens: int, share: float) -> float:
    """Seconds by the strategies behind the table: no fused decode from 5 tokens on, atomics without a cast
    for 512."""
    load = Load(tokens, share)
    if tokens == 1:
        return cost.decode_time(FLAT, block, load)
    if tokens <= 64:
        return cost.union_time(FLAT, block, load)
    pairs = cost.pairs_time(FLAT, block, load)
    if tokens > 512:
        return pairs
    return min(pairs, cost.atomics_time(FLAT, block, load, cast=False))


@pytest.mark.parametrize("block", TABLE)
def test_agrees_with_an_independent_table(block: Block) -> None:
    for tokens, (dense, speedups) in TABLE[block].items():
        found = cost.dense_time(FLAT, block, tokens)
        assert found * 1e6 == pytest.approx(dense, rel=0.03), tokens
        for share, speedup in zip(SHARES, speedups, strict=True):
            bound = BEYOND.get((block, tokens, share), 0.15)
            assert found / published(block, tokens, share) == pytest.approx(speedup, rel=bound), (
                tokens,
                share,
            )


@pytest.mark.parametrize(
    ("union", "speedup"), [(0.1, 6.5), (0.2, 4.0), (0.3, 2.9), (0.5, 1.8), (0.7, 1.4)]
)
def test_a_measured_union_decides_some_tens_of_tokens(union: float, speedup: float) -> None:
    for tokens in (8, 64):
        load = Load(tokens, 0.05, union)
        found = cost.dense_time(FLAT, MISTRAL, tokens) / cost.union_time(FLAT, MISTRAL, load)
        assert found == pytest.approx(speedup, rel=0.05)


@pytest.mark.parametrize(
    ("size", "share"), [(32, 0.21), (64, 0.35), (128, 0.53), (256, 0.63), (512, 0.72)]
)
def test_larger_experts_break_even_later(size: int, share: float) -> None:
    block = replace(MISTRAL, experts=MISTRAL.hidden // size)
    only = {"pairs": cost.pairs_time}
    found = cost.break_even(FLAT, block, 50432, strategies=only)
    assert found == pytest.approx(share, rel=0.08)


@given(gpus, blocks, rows, shares, shares)
@settings(deadline=None)
def test_a_larger_share_is_never_faster(gpu, block, tokens, one, other) -> None:
    low, high = sorted((one, other))
    chunked = partial(cost.pairs_time, chunks=4)
    for strategy in (*cost.STRATEGIES.values(), chunked):
        faster, slower = (strategy(gpu, block, Load(tokens, share)) for share in (low, high))
        assert faster <= slower


@given(gpus, blocks, rows, rows, shares)
@settings(deadline=None)
def test_more_tokens_are_never_faster(gpu, block, one, other, share) -> None:
    few, many = sorted((one, other))
    assert cost.dense_time(gpu, block, few) <= cost.dense_time(gpu, block, many)
    assert cost.moe_time(gpu, block, Load(few, share)) <= cost.moe_time(
        gpu, block, Load(many, share)
    )


@given(gpus, blocks, rows)
@settings(deadline=None)
def test_break_even_separates_faster_from_slower(gpu, block, tokens) -> None:
    found, dense = (
        cost.break_even(gpu, block, tokens),
        cost.dense_time(gpu, block, tokens),
    )
    if found > 0:
        assert cost.moe_time(gpu, block, Load(tokens, found)) <= dense
    if found < 1:
        assert cost.moe_time(gpu, block, Load(tokens, min(1, found + 1e-3))) > dense


@given(shares, rows)
def test_union_and_rows_of_experts(share: float, tokens: int) -> None:
    load = Load(tokens, share)
    assert share <= load.used <= 1
    assert Load(1, share).used == share
    assert load.rows * load.used == pytest.approx(tokens * share)
    assert Load(tokens, share, 1.0).rows == pytest.approx(tokens * share)


def test_column_chunks_keep_pair_rows_in_l2() -> None:
    load = Load(4096, 0.25)
    whole, chunked = (cost.pairs_time(H200, MISTRAL, load, chunks) for chunks in (1, 32))
    assert chunked < whole


def test_the_kind_of_a_generated_kernel_is_a_block() -> None:
    spec = Spec(64, 32, 4, 16, 8, gated=True, bf16=True, activation="relu(gate) * up")
    assert Block.of(spec) == Block(64, 32, 64, 4, 8, gated=True, dtype="bf16")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Block(8, 8, 10, 3, 8, gated=False),
        lambda: replace(SMALL, dtype="int3"),
        lambda: Load(0, 0.5),
        lambda: Load(4, 1.5),
        lambda: Load(4, 0.5, 0.4),
        lambda: Gemm(0, 1, 8, 8),
        lambda: Gemm(1, 1, 8, 8, dtype="int3"),
        lambda: H200.rate("int3", 1.0),
    ],
)
def test_impossible_values_are_refused(wrong) -> None:
    with pytest.raises(TuningError, match="expected"):
        wrong()


@pytest.mark.parametrize(
    ("gpu", "registers", "shared", "warps", "resident"),
    [  # as the compiler's resource usage and NVIDIA's occupancy rules give them
        ("H200", 127, 96, 8, 2),
        ("A100", 224, 64, 8, 1),
        ("H200", 255, 144, 8, 1),
        ("H200", 255, 96, 4, 2),
        ("H200", 128, 96, 16, 1),
        ("H200", 64, 16, 16, 2),
        ("H200", 255, 240, 8, 0),
        ("MI300X", 128, 64, 4, 1),
        ("MI300X", 128, 16, 4, 4),
    ],
)
def test_resident_ctas(gpu: str, registers: int, shared: int, warps: int, resident: int) -> None:
    assert GPUS[gpu].resident(registers, shared << 10, warps) == resident


gemms = st.builds(
    Gemm,
    rows=st.floats(0.1, 1e5),
    groups=st.integers(1, 512),
    n=st.sampled_from([16, 32, 96, 128, 256, 768, 4096]),
    k=st.sampled_from([32, 128, 768, 4096]),
    outputs=st.integers(1, 2),
    dtype=st.sampled_from(["bf16", "fp16", "tf32", "fp32"]),
    swapped=st.booleans(),
)


@given(gpus, gemms)
@settings(deadline=None)
def test_no_rule_drops_the_default_tile(gpu, gemm: Gemm) -> None:
    default = tiles.default_tile(gpu, gemm)
    assert tiles.unfit(gpu, gemm, default) is None
    assert default.resident(gpu, gemm) >= 1


@given(gpus, gemms)
@settings(deadline=None, max_examples=20)
def test_candidates_fit_and_are_ranked(gpu, gemm: Gemm) -> None:
    found = tiles.candidates(gpu, gemm, limit=10)
    assert len(found) == 10
    assert tiles.default_tile(gpu, gemm) in [tile for tile, _ in found]
    assert [time for _, time in found[:-1]] == sorted(time for _, time in found[:-1])
    for tile, _ in found:
        assert tiles.unfit(gpu, gemm, tile) is None


@given(gpus, gemms, st.floats(1, 8))
@settings(deadline=None)
def test_more_rows_are_never_faster(gpu, gemm: Gemm, factor: float) -> None:
    tile = tiles.default_tile(gpu, gemm)
    more = replace(gemm, rows=gemm.rows * factor)
    assert tiles.estimate(gpu, gemm, tile) <= tiles.estimate(gpu, more, tile) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("tile", "outputs", "reason"),
    [
        (Tile(128, 256, 64, 8, 3), 2, "shared memory"),
        (Tile(128, 256, 32, 8, 2), 2, "spill"),
        (Tile(64, 64, 64, 2, 2), 1, "wgmma"),
        (Tile(16, 32, 64, 4, 2), 1, "tiny"),
        (Tile(128, 128, 16, 8, 2), 1, "tiny"),
    ],
)
def test_each_rule_drops_a_tile(tile: Tile, outputs: int, reason: str) -> None:
    assert reason in (tiles.unfit(H200, Gemm(64, 8, 128, 768, outputs), tile) or "")


def test_products_of_a_block() -> None:
    load = Load(4096, 0.1)
    up, down = tiles.up_gemm(MISTRAL, load), tiles.down_gemm(MISTRAL, load)
    assert (up.n, up.k, up.outputs) == (128, 4096, 2)
    assert (down.n, down.k, down.outputs) == (4096, 128, 1)
    assert up.rows == down.rows == pytest.approx(409.6)
    assert tiles.default_tile(H200, up) == Tile(128, 128, 64, 8, 4)
    assert tiles.default_tile(A100, up) == Tile(128, 64, 64, 8, 4)
    few = tiles.default_tile(H200, tiles.up_gemm(MISTRAL, Load(64, 0.1)))
    assert few.block_m == 16


def test_two_programs_share_an_sm_where_their_sums_fit() -> None:
    load = Load(4096, 0.1)
    assert tiles.default_tile(H200, tiles.up_gemm(SMALL, load)) == Tile(128, 128, 64, 8, 3)
    assert tiles.default_tile(H200, tiles.down_gemm(SMALL, load)) == Tile(128, 128, 64, 8, 2)
    tiny = replace(SMALL, experts=96)
    assert tiles.default_tile(H200, tiles.down_gemm(tiny, load)).block_k == tiny.size == 32


def test_tiles_of_few_tokens_are_high_where_all_sms_have_one() -> None:
    glu = GpuSpec(4096, 4096, 112, 128, True, "silu(gate) * up")
    decode = partial(of_strategy, "decode", glu, gpu=H200)
    assert decode(load=Load(64, 0.1)).up == Tile(64, 64, 64, 4, 4)
    assert decode(load=Load(64, 0.1, 0.5)).up == Tile(64, 32, 128, 4, 4)
    assert decode(load=Load(64, 0.1, 0.2)).up.block_n == 16
