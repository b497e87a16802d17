"""Sites that read one x in one launch: the bits of each alone, whatever their sizes, with fewer launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from blocks import masks
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from d2dcompile import testing
from d2dcompile.errors import KernelError
from d2dcompile.gpu_blocks import GpuSchedule, GpuSpec
from d2dcompile.gpu_defaults import of_strategy
from d2dcompile.gpus import H200
from d2dcompile.kernels import beside
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.dispatch import gpu as lists_gpu
from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.kernels.expert_mlp.call import Call
from d2dcompile.kernels.expert_mlps import expert_mlps
from d2dcompile.kernels.expert_mlps import gpu as experts_gpu
from d2dcompile.kernels.gate import tau_bits
from d2dcompile.kernels.launching import Launched, noting
from d2dcompile.kernels.route import gpu as route_gpu
from d2dcompile.kernels.route import route
from d2dcompile.kernels.routes import gpu as routes_gpu
from d2dcompile.kernels.routes import routes
from d2dcompile.load import Load
from d2dcompile.tiles import Tile

pytestmark = pytest.mark.triton
ON = "cuda" if torch.cuda.is_available() else "cpu"
IMPL = "gpu" if ON == "cuda" else "interpreter"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
D = 40
QKV = [  # of grouped-query attention: k and v are narrower, and of other numbers of experts
    GpuSpec(D, 72, 5, 24, False, "relu(up)"),
    GpuSpec(D, 24, 3, 8, False, "relu(up)"),
    GpuSpec(D, 20, 19, 5, False, "relu(up)"),
]
GATED = [replace(spec, gated=True, activation="silu(gate) * up") for spec in QKV[:2]]


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory is NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Site:
    """Random weights and lists of one site, on the device that is tested."""

    def __init__(self, spec: GpuSpec, rows: int, dtype: torch.dtype, seed: int) -> None:
        draw, hidden = torch.Generator().manual_seed(seed), spec.experts * spec.size

        def random(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=draw) * shape[-1] ** -0.5).to(ON, dtype)

        self.spec, bias = spec, seed != 1  # the second site has none
        self.slabs: list[Tensor | None] = [
            random(hidden, spec.d),
            random(hidden, spec.d) if spec.gated else None,
            random(hidden, spec.out),
            random(hidden) if bias else None,
            random(hidden) if bias and spec.gated else None,
            random(spec.out) if bias else None,
        ]
        share = ("none" if seed == 2 else 0.4) if rows > 1 else 0.4
        self.lists = dispatch.meaning(masks(rows, spec.experts, share, seed).to(ON))

    def call(self, x: Tensor) -> Call:
        y = x.new_full((len(x), self.spec.out), torch.nan)
        names = ("w_up", "w_gate", "w_down", "b_up", "b_gate", "b_down")
        weights = dict(zip(names, self.slabs, strict=True))
        return Call(self.spec, x, self.lists, weights, [], y)

    def meaning(self, x: Tensor) -> Tensor:
        wide = [None if w is None else w.to(x.dtype) for w in self.slabs]
        return expert_mlp.meaning(x, *self.lists, *wide, None, [], self.spec.activation)


def sites_of(specs: Sequence[GpuSpec], rows: int, dtype: torch.dtype) -> tuple[Tensor, list[Site]]:
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(9)).to(ON, dtype)
    return x, [Site(spec, rows, dtype, seed) for seed, spec in enumerate(specs)]


def schedules_of(sites: Sequence[Site], rows: int) -> list[GpuSchedule]:
    """The default schedules, one of them with other splits and fewer programs."""
    load = Load(max(1, rows), 0.4)
    found = [of_strategy("decode", site.spec, load, H200) for site in sites]
    return [replace(found[0], splits=3, per_multiprocessor=1), *found[1:]]


def names(noted: Sequence[Launched]) -> list[str]:
    return [item.name for item in noted]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("specs", [QKV, GATED], ids=["qkv", "gated"])
def test_experts_have_the_bits_of_each_site_alone(specs, rows, dtype) -> None:
    x, sites = sites_of(specs, rows, DTYPES[dtype])
    schedules = schedules_of(sites, rows)
    alone, together = ([site.call(x) for site in sites] for _ in range(2))
    for call, schedule in zip(alone, schedules, strict=True):
        call.run(schedule)
    experts_gpu.run_calls(list(zip(together, schedules, strict=True)))
    for site, one, other in zip(sites, alone, together, strict=True):
        assert torch.equal(one.y, other.y)
        exact = site.meaning(x.double())
        usual = testing.rms(site.meaning(x).double() - exact)
        bound = 2 * max(usual, torch.finfo(x.dtype).eps * testing.rms(exact))
        assert testing.rms(other.y.double() - exact) <= bound
    assert len({call.y.double().sum().item() for call in together}) == len(sites)


@pytest.mark.parametrize("rows", [1, 64])
def test_one_launch_up_and_one_down_for_all_sites(rows) -> None:
    x, sites = sites_of(QKV, rows, torch.float32)
    schedules = schedules_of(sites, rows)
    with noting() as noted:
        experts_gpu.run_calls(list(zip([s.call(x) for s in sites], schedules, strict=True)))
    up = "decode_up_one" if rows == 1 else "decode_up"
    assert names(noted) == [up, "decode_down"]
    assert all(item.grid[-1] == len(sites) for item in noted)
    assert noted[0].grid[0] <= max(s.experts * s.size for s in QKV)
    specs = [site.spec for site in sites]
    assert names(experts_gpu.launches(specs, rows, schedules)) == names(noted)


def test_persistent_programs_share_all_work_however_many_a_site_has_alone() -> None:
    x, sites = sites_of(QKV, 5, torch.float32)
    schedules, calls = schedules_of(sites, 5), [site.call(x) for site in sites]
    noted = []
    for call, schedule in zip(calls, schedules, strict=True):
        with noting() as own:
            call.run(schedule)
        noted.append(own)
    ups, downs = (list(items) for items in zip(*noted, strict=True))
    ups[0] = replace(ups[0], grid=(1,))
    assert ups[1].grid[0] > 1
    beside.launch_beside(ups, persistent=True)
    beside.launch_beside(downs)
    for site, call, schedule in zip(sites, calls, schedules, strict=True):
        alone = site.call(x)
        alone.run(schedule)
        assert torch.equal(call.y, alone.y)


def test_sites_that_do_not_decode_or_have_other_warps_are_launched_apart() -> None:
    x, sites = sites_of(QKV, 5, torch.float32)
    few, many = Tile(16, 16, 32, 4, 1), Tile(16, 32, 16, 4, 1)
    decode = GpuSchedule("decode", few, many, splits=2)
    schedules = [
        decode,
        replace(decode, down=replace(many, warps=8)),
        GpuSchedule("pairs", few, many),
    ]
    calls = [site.call(x) for site in sites]
    with noting() as noted:
        experts_gpu.run_calls(list(zip(calls, schedules, strict=True)))
    assert names(noted) == ["up", "down", "combine", *["decode_up", "decode_down"] * 2]
    experts_gpu.run_calls(list(zip(calls, schedules, strict=True)))
    assert all(call.y.isfinite().all() for call in calls)
    with pytest.raises(KernelError, match="cannot be one"):
        beside.launch_beside([noted[-1], noted[-3]])


def test_loads_are_as_deep_as_the_site_with_the_least_room_takes() -> None:
    deep, flat = Tile(16, 16, 32, 4, 4), Tile(16, 16, 32, 4, 2)
    schedules = [GpuSchedule("decode", tile, tile) for tile in (deep, flat)]
    noted = experts_gpu.launches(QKV[:2], 8, schedules)
    assert [item.options["num_stages"] for item in noted] == [2, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 5, 64, 65, 130])
@pytest.mark.parametrize("reads", [(0, 0, 0), (0, 1, 2), (0, 1, 0)], ids=str)
def test_routing_has_the_bits_of_each_site_alone(reads, rows, dtype, monkeypatch) -> None:
    """Also where one site has so many experts that 64 tokens are many; with counts added up apart too."""
    monkeypatch.setattr(lists_gpu, "ADDED", 0 if dtype == "fp16" else 32)
    x, router1, router2, taus = routers(reads, rows, DTYPES[dtype])
    found = routes_gpu.run(x, router1, router2, taus, list(reads))
    lengths = set()
    for i, (number, second, tau) in enumerate(zip(reads, router2, taus, strict=True)):
        expected = route_gpu.run(x, router1[number], second, tau)
        tokens, offsets, slots = found[3 * i : 3 * i + 3]
        pairs = int(offsets[-1])
        lengths.add(pairs)
        assert torch.equal(offsets, expected[1])
        assert torch.equal(tokens[:pairs], expected[0][:pairs])
        used = torch.arange(slots.shape[1], device=ON)[None] <= slots[:, :1]
        assert torch.equal(slots[used], expected[2][used])
    assert rows < 5 or len(lengths) == 3


def routers(
    reads: Sequence[int], rows: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """x, first layers of differing widths, second ones of differing numbers of experts, and taus."""
    draw = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(ON, dtype)

    widths = (12, 20, 33)[: max(reads) + 1]
    experts = (4, 37, 150 if reads == (0, 1, 2) else 100)
    seconds = [random(e, widths[n]) for e, n in zip(experts, reads, strict=True)]
    taus = [tau_bits(tau, torch.device(ON)) for tau in (0.2, 0.5, 0.4)]
    return random(rows, D), [random(width, D) for width in widths], seconds, taus


@pytest.mark.parametrize(
    "reads, tokens, expected",
    [
        ((0, 0, 0), 3, ["hidden_few", "route_few"]),
        ((0, 1, 2), 3, ["hidden_few", "route_few"]),
        ((0, 0, 0), 4000, ["hidden_many", "route_given", "add_up", "write_lists"]),
        ((0, 1, 2), 4000, ["route_many", "add_up", "write_lists"]),
        ((0, 1, 0), 500, ["hidden_many", "route_many", "route_given", "write_lists"]),
    ],
)
def test_a_first_layer_is_computed_once_and_every_kernel_launched_once(
    reads, tokens, expected
) -> None:
    widths = [128] * (max(reads) + 1)
    noted = routes_gpu.launches(768, widths, [24, 8, 8], list(reads), tokens, torch.bfloat16)
    assert names(noted) == expected
    counts = {item.name: item.grid[-1] for item in noted if len(item.grid) > 1}
    assert counts["write_lists" if tokens > 3 else "route_few"] == 3
    if tokens == 3:
        shared = len(widths) == 1
        assert noted[0].grid == (8, 4) if shared else (8, 4, 3)


def runs(kind: str) -> Callable[[], list[Tensor]]:
    """One call of each kind of kernel for several sites."""
    if kind == "experts":
        x, sites = sites_of(QKV, 16, torch.float32)

        def run() -> list[Tensor]:
            calls = [site.call(x) for site in sites]
            experts_gpu.run_calls(list(zip(calls, schedules_of(sites, 16), strict=True)))
            return [call.y for call in calls]

        return run
    rows = 16 if kind == "few" else 150
    x, router1, router2, taus = routers((0, 0, 1), rows, torch.float32)
    return lambda: [
        made[: int(offsets[-1])] if made.ndim == 1 else made[:, 0]
        for lists in zip(
            *[iter(routes_gpu.run(x, router1, router2, taus, [0, 0, 1]))] * 3, strict=True
        )
        for offsets in lists[1:2]
        for made in lists
    ]


@pytest.mark.parametrize("kind", ["experts", "few", "many"])
def test_bits_do_not_depend_on_the_order_of_programs(kind) -> None:
    if ON == "cuda":
        pytest.skip("a device chooses the order itself")
    from interpreter import shuffled

    run = runs(kind)
    first = run()
    for seed in range(3):
        with shuffled(seed):
            assert all(map(torch.equal, run(), first))


@pytest.mark.parametrize("rows", [0, 3, 65])
def test_the_ops_are_the_lists_of_the_single_ops(rows, monkeypatch) -> None:
    """In shapes, dtypes and FLOPs, fake or not; on request through the kernels, to the bits of theirs."""
    x, sites = sites_of(QKV, rows, torch.float32)
    x = x.view(1, rows, D)
    lists = [made for site in sites for made in site.lists]
    slabs = [slab for site in sites for slab in site.slabs]
    _, router1, router2, taus = routers((0, 0, 1), rows, torch.float32)
    routing = (x, router1, router2, taus, [0, 0, 1])

    def singly() -> tuple[list[Tensor], list[Tensor]]:
        ys = [expert_mlp(x, *s.lists, *s.slabs, None, [], "relu(up)") for s in sites]
        parts = zip((0, 0, 1), router2, taus, strict=True)
        return ys, [made for n, w2, tau in parts for made in route(x, router1[n], w2, tau)]

    for impl in (IMPL, "reference"):
        wanted = ("routes", "expert_mlps", "route", "expert_mlp")
        monkeypatch.setenv("D2D_IMPL", ",".join(f"{name}:{impl}" for name in wanted))
        ys, made = expert_mlps(x, lists, slabs, "relu(up)"), routes(*routing)
        expected, single = singly()
        assert all(map(torch.equal, ys, expected))
        assert all(map(torch.equal, made[1::3], single[1::3]))
        described = [(t.shape, t.dtype) for t in (*ys, *made)]
        assert described == [(t.shape, t.dtype) for t in (*expected, *single)]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, *lists, *(s for s in slabs if s is not None))]
        given = iter(fake[1 + len(lists) :])
        kept = [None if s is None else next(given) for s in slabs]
        ys = expert_mlps(fake[0], fake[1 : 1 + len(lists)], kept, "relu(up)")
        made = routes(
            *(
                [mode.from_tensor(t) for t in a]
                if isinstance(a, list) and isinstance(a[0], Tensor)
                else mode.from_tensor(a)
                if isinstance(a, Tensor)
                else a
                for a in routing
            )
        )
        assert [(t.shape, t.dtype) for t in (*ys, *made)] == described
    with FlopCounterMode(display=False) as counter:
        routes(*routing)
        expert_mlps(x, lists, slabs, "relu(up)")
    layers = sum(layer.numel() for layer in (*router1, *router2))
    macs = sum(int(s.lists[1][-1]) * s.spec.size * (D + s.spec.out) for s in sites)
    assert counter.get_total_flops() == 2 * (rows * layers + macs)


def test_a_site_that_kernels_refuse_sends_all_to_the_single_ops() -> None:
    x, sites = sites_of(QKV, 3, torch.float32)
    lists = [made for site in sites for made in site.lists]
    slabs = [slab for site in sites for slab in site.slabs]
    assert experts_gpu.accepts(x, lists, slabs, "relu(up)")
    assert not experts_gpu.accepts(x, lists, [*slabs[:-1], slabs[-1].double()], "relu(up)")
    _, router1, router2, taus = routers((0, 0, 1), 3, torch.float32)
    assert routes_gpu.accepts(x, router1, router2, taus, [0, 0, 1])
    wide = torch.randn(300, D, device=ON)
    assert not routes_gpu.accepts(x, [router1[0], wide], router2, taus, [0, 0, 1])


def test_generated_source_names_every_sites_own_kernel_and_bounds() -> None:
    noted = experts_gpu.launches(QKV, 8, schedules_of(sites_of(QKV, 8, torch.float32)[1], 8))
    up, down = (item.kernel.fn for item in noted)
    text = down.__globals__["__doc__"]
    assert text == "decode_down of 3 sites side by side: which one is said by axis 2 of the grid."
    kernels = [down.__globals__[f"decode_down_of_{i}"] for i in range(3)]
    assert len({kernel.fn.__module__ for kernel in kernels}) == 3
    bounds = {name for name in down.__annotations__ if name.startswith("PROGRAMS")}
    assert bounds == {"PROGRAMS_1_0", "PROGRAMS_1_1", "PROGRAMS_1_2"}  # splits; one column each
    assert not any(name.startswith("PROGRAMS") for name in up.__annotations__)
