"""What calls launch on GPUs that are not here, compiled: laws that every kernel keeps, and golden figures.

Laws: nothing spills, a CTA fits its SM, Hopper multiplies with wgmma, memory moves by 16 bytes. Figures:
tests/expected/resources.json, by Triton's version; UPDATE_EXPECTED=1 accepts what they are now.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from d2dcompile.gpu_blocks import GpuSchedule, GpuSpec, padded
from d2dcompile.gpu_defaults import of_strategy
from d2dcompile.gpus import A100, H200, MI300X, Gpu
from d2dcompile.kernels import aot
from d2dcompile.kernels.dispatch import buffers
from d2dcompile.kernels.dispatch import gpu as lists_gpu
from d2dcompile.kernels.expert_mlp import call as block_call
from d2dcompile.kernels.expert_mlps import gpu as beside_gpu
from d2dcompile.kernels.launching import Launched, noting
from d2dcompile.kernels.native import SLABS
from d2dcompile.kernels.resources import Resources
from d2dcompile.kernels.route import gpu as route_gpu
from d2dcompile.kernels.routes import gpu as routes_gpu
from d2dcompile.load import Load

pytestmark = pytest.mark.triton
EXPECTED = Path(__file__).parents[1] / "expected" / "resources.json"
REGISTERS, INSTRUCTIONS = 16, 0.15  # what golden figures may differ by
ROUTER, SHARE = 128, 0.1
# Blackwell is given Hopper's schedules, as a device that is not known is; its SM holds as much.
GPUS: dict[str, Gpu] = {"sm_80": A100, "sm_90": H200, "sm_100": H200, "gfx942": MI300X}
GLU = GpuSpec(4096, 4096, 112, 128, True, "silu(gate) * up")
FFN = GpuSpec(768, 768, 24, 128, False, "gelu(up)")
SMALL = replace(FFN, experts=96, size=32)
INT8 = replace(GLU, int8=True)
# Blocks in the place of the projections of grouped-query attention, Q and either of K and V.
QKV = GpuSpec(4096, 4096, 16, 128, False, "relu(up)")
KV = replace(QKV, out=1024, experts=6)
DTYPES = {name: dtype for dtype, name in block_call.NAMES.items()}

DECODE = [("decode", tokens) for tokens in (1, 16, 64)]
MANY = [("pairs", 512), ("pairs", 4096)]  # the first one with weights first on Hopper
BESIDE = [("beside", 1), ("beside", 64), ("shared", 64)]
LISTS = [("routing", 1), ("routing", 64), ("routing", 4096), ("lists", 4096), ("sums", 4096)]
CALLS: dict[str, list[tuple[str, GpuSpec, list[tuple[str, int]]]]] = {
    "sm_90": [
        ("glu", GLU, [*DECODE, *MANY, ("tma", 4096), ("atomic", 4096), ("dense", 512), *LISTS]),
        ("ffn", FFN, [*DECODE, *MANY, ("atomic", 4096), ("dense", 512)]),
        ("small", SMALL, [("decode", 16), ("pairs", 4096)]),
        ("glu fp16", replace(GLU, dtype="fp16"), [("pairs", 4096)]),
        ("glu tf32", replace(GLU, dtype="fp32", precision="tf32"), [("pairs", 512)]),
        ("ffn fp32", replace(FFN, dtype="fp32"), [("pairs", 4096)]),
        ("glu int8", INT8, DECODE),
        ("small int8", replace(SMALL, int8=True, dtype="fp16"), [("decode", 16)]),
        ("qkv", QKV, [*BESIDE, ("shared", 4096)]),
    ],
    "sm_80": [
        ("glu", GLU, [*DECODE, *MANY, ("atomic", 4096), *LISTS[:3]]),
        ("ffn", FFN, [("pairs", 4096)]),
        ("small", SMALL, [("pairs", 512), ("atomic", 4096)]),
        ("ffn fp32", replace(FFN, dtype="fp32"), [("decode", 64)]),
        ("glu int8", INT8, [("decode", 64)]),
        ("qkv", QKV, [("beside", 16)]),
    ],
    "sm_100": [
        ("glu", GLU, [("decode", 64), ("tma", 4096)]),
        ("glu int8", INT8, [("decode", 64)]),
        ("qkv", QKV, [("beside", 64)]),
    ],
    "gfx942": [
        ("glu", GLU, [("decode", 1), ("decode", 64), ("pairs", 4096), ("routing", 64)]),
        ("small", SMALL, [("decode", 16), ("pairs", 512), ("atomic", 4096), ("lists", 4096)]),
        ("glu int8", INT8, [("decode", 16)]),
        ("qkv", QKV, [("beside", 16)]),
    ],
}


def schedule(strategy: str, spec: GpuSpec, load: Load, gpu: Gpu) -> GpuSchedule:
    """The default schedule; of "tma" that of pairs with weights read through descriptors."""
    if strategy != "tma":
        return of_strategy(strategy, spec, load, gpu)
    return replace(of_strategy("pairs", spec, load, gpu), tma=True)


def sums(spec: GpuSpec, tokens: int) -> list[Launched]:
    """The end of the backward pass: rows of pairs added up for each token."""
    rows = torch.empty(tokens, spec.d, dtype=DTYPES[spec.dtype], device="meta")
    absent: dict[str, Tensor | None] = dict.fromkeys(SLABS)
    with noting() as noted:
        call = block_call.Call(spec, rows, buffers(rows, tokens, spec.experts), absent, [], rows)
        call.summed(rows.new_empty(tokens * spec.experts, spec.d))
    return noted


def lists(spec: GpuSpec, tokens: int) -> list[Launched]:
    """The lists of a given mask."""
    with noting() as noted:
        lists_gpu.run(torch.empty(tokens, spec.experts, dtype=torch.bool, device="meta"))
    return noted


def routing(spec: GpuSpec, tokens: int) -> list[Launched]:
    return route_gpu.launches(spec.d, ROUTER, spec.experts, tokens, DTYPES[spec.dtype])


def shared(spec: GpuSpec, tokens: int) -> list[Launched]:
    """Routing of Q, K and V whose routers share their first layer."""
    experts, reads = [spec.experts, KV.experts, KV.experts], [0, 0, 0]
    return routes_gpu.launches(spec.d, [ROUTER], experts, reads, tokens, DTYPES[spec.dtype])


def beside(spec: GpuSpec, tokens: int, gpu: Gpu) -> list[Launched]:
    """Q, K and V of few tokens in one launch each of up and down."""
    specs = [spec, KV, KV]
    schedules = [of_strategy("decode", each, Load(tokens, SHARE), gpu) for each in specs]
    return beside_gpu.launches(specs, tokens, schedules)


OTHERS: dict[str, Callable[[GpuSpec, int], list[Launched]]] = {
    "sums": sums, "lists": lists, "routing": routing, "shared": shared,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A launch of some call: who makes it, and what it has to move and multiply."""

    name: str
    target: str
    spec: GpuSpec
    strategy: str
    launched: Launched

    @property
    def kernel(self) -> str:
        return self.launched.name

    @property
    def options(self) -> dict[str, Any]:
        """The launch's options; of several sites side by side those of the first."""
        return {name.removesuffix("_0"): n for name, n in self.launched.options.items()}

    @property
    def first(self) -> int:
        """Rows of the first operand of a product; 0 of a kernel without one."""
        given, int8 = self.options, self.spec.int8
        rows = {
            "up": given.get("BLOCK_N" if given.get("SWAP") else "BLOCK_M"),
            "down": given.get("BLOCK_N" if given.get("SWAP") else "BLOCK_M"),
            "decode_up": given.get("BLOCK_N"),
            "decode_down": 0 if given.get("ONE") else given.get("BLOCK_N" if int8 else "BLOCK_T"),
            "hidden_few": given.get("BLOCK_R"),
            "route_few": given.get("BLOCK_T"),
            "route_many": given.get("BLOCK_T"),
            "hidden_many": given.get("BLOCK_T"),
            "route_given": given.get("BLOCK_T"),
        }
        return rows.get(self.kernel, 0)

    @property
    def grouped(self) -> bool:
        """Whether the first operand has the rows, and the program the warps, of a group of four."""
        return self.first >= 64 and self.launched.options["num_warps"] >= 4

    @property
    def weights(self) -> int:
        """Bytes of weights, or of rows where there are none, in a step of its main loop."""
        given, spec = self.options, self.spec
        n, k, j = (given.get(name, 0) for name in ("BLOCK_N", "BLOCK_K", "BLOCK_J"))
        ups = 2 if spec.gated else 1
        values = {
            **{"up": ups * n * k, "down": n * k, "decode_up": ups * n * k, "decode_down": n * k},
            "decode_up_one": ups * n * spec.d,
            "combine": j * n,
            "sum_pairs": j * n,
            "hidden_few": given.get("BLOCK_R", 0) * k,
            "route_few": padded(spec.experts) * ROUTER,
            "route_many": ROUTER * k,
            "hidden_many": ROUTER * k,
            "pointwise": ups * given.get("BLOCK", 0),
        }
        streamed = spec.streamed if self.kernel.startswith("decode") else spec.itemsize
        return values.get(self.kernel, 0) * streamed

    @property
    def result(self) -> int:
        """Bytes of a tile of its result in bf16 or the like; 0 where it is no tile of rows."""
        given = self.options
        m, n = given.get("BLOCK_M", 0), given.get("BLOCK_N", 0)
        values = {
            **{"up": m * n, "down": 0 if given.get("ATOMIC") else m * n, "combine": n, "finish": n},
            "sum_pairs": n,
            "decode_up": n * given.get("BLOCK_T", 0),
            "pointwise": given.get("BLOCK", 0),
        }
        return values.get(self.kernel, 0) * self.spec.itemsize


def cases() -> list[Case]:
    """Every launch of CALLS, of equal ones the first."""
    found: dict[Any, Case] = {}
    for target, calls in CALLS.items():
        for label, spec, ways in calls:
            for strategy, tokens in ways:
                if strategy in OTHERS:
                    launches = OTHERS[strategy](spec, tokens)
                elif strategy == "beside":
                    launches = beside(spec, tokens, GPUS[target])
                else:
                    chosen = schedule(strategy, spec, Load(tokens, SHARE), GPUS[target])
                    launches = block_call.launches(spec, tokens, chosen)
                for launched in launches:
                    name = f"{target} {label} {strategy} {tokens} {launched.name}"
                    case = Case(name, target, spec, strategy, launched)
                    found.setdefault((target, identity(launched)), case)
    return list(found.values())


def identity(launched: Launched) -> tuple[Any, ...]:
    """What tells compiled kernels apart: file and name, options, dtypes.

    Launches of a call differ in integers besides, such as the first column: all divisible by 16.
    """
    dtypes = tuple(a.dtype if isinstance(a, Tensor) else type(a).__name__ for a in launched.args)
    module: str = launched.kernel.fn.__module__
    return module, launched.name, dtypes, tuple(sorted(launched.options.items()))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Case, Resources]]:
    """Every case and what became of it; workers of one run of the tests compile them once."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    wanted, path = cases(), shared / "compiled.pickle"
    with FileLock(shared / "compiled.lock"):
        if not path.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TRITON_CACHE_DIR", str(shared / "triton"))
                found = aot.compile_all([case.launched.job(case.target) for case in wanted])
            path.write_bytes(pickle.dumps(found))
    found = pickle.loads(path.read_bytes())
    failed = [f"{c.name}: {r}" for c, r in zip(wanted, found, strict=True) if isinstance(r, str)]
    assert not failed, failed
    return list(zip(wanted, found, strict=True))


def keep(compiled: list[tuple[Case, Resources]], law: Callable[[Case, Resources], bool]) -> bool:
    """Whether all cases keep a law; says which do not."""
    broken = [
        f"{case.name}: {found.registers} registers, {found.spill} bytes spilled, {found.shared} shared, "
        f"{found.instructions}, {case.launched.options}"
        for case, found in compiled
        if not law(case, found)
    ]
    print(*broken, sep="\n")
    return not broken


def nvidia(case: Case) -> bool:
    return case.target.startswith("sm_")


def test_nothing_spills(compiled) -> None:
    assert keep(compiled, lambda case, found: found.spill == 0)


def test_a_program_fits(compiled) -> None:
    assert keep(compiled, lambda case, found: found.resident(GPUS[case.target]) >= 1)


def test_hopper_multiplies_with_wgmma(compiled) -> None:
    """Where the first operand has its 64 rows, and never one after another. fp32 is multiplied by FFMA.

    Products with int8 weights are meant for mma.sync, and have two warps a program.
    """

    def law(case: Case, found: Resources) -> bool:
        if case.target != "sm_90" or not case.first:
            return not found.serialized
        if case.spec.dtype == "fp32" and case.spec.precision == "ieee":
            return not found.count("HGMMA", "HMMA")
        one, other = ("HGMMA", "HMMA") if case.grouped else ("HMMA", "HGMMA")
        return not found.serialized and found.count(one) > 0 == found.count(other)

    assert keep(compiled, law)


def test_others_multiply_with_their_own(compiled) -> None:
    """MFMA and mma.sync where there is a product; Blackwell's tensor memory where tiles have 64 rows."""

    def law(case: Case, found: Resources) -> bool:
        if case.spec.dtype == "fp32" or case.target == "sm_90":
            return True
        name = {"sm_80": "HMMA", "gfx942": "v_mfma", "sm_100": "UTCHMMA"}[case.target]
        if case.target == "sm_100" and not case.grouped:
            name = "HMMA"
        return bool(found.count(name)) is bool(case.first)

    assert keep(compiled, law)


def test_weights_and_rows_move_by_16_bytes(compiled) -> None:
    """Wide loads carry all weights of a step; nothing is copied to shared memory by fewer bytes at once.

    Exceptions: wgmma takes tf32 operands along the inner dimension only, and W_down lies across it; hidden
    values of 16 tokens and 32 neurons are 8 bytes a thread.
    """

    def law(case: Case, found: Resources) -> bool:
        if not nvidia(case) or not case.weights:
            return True
        threads = 32 * found.num_warps
        wide = found.count("LDG.128", "LDGSTS.128") * 16 * threads
        carried = wide >= case.weights or found.count("UTMALDG") > 0
        narrow = found.count("LDGSTS") - found.instructions.get("LDGSTS.128", 0)
        tf32 = case.spec.precision == "tf32" and found.count("HGMMA") > 0
        if tf32 and case.kernel in ("down", "decode_down"):
            return found.instructions.get("LDGSTS.128", 0) > 0
        tiny = case.kernel == "decode_down" and case.spec.size == 32
        return carried and (narrow == 0 or tiny)

    assert keep(compiled, law)


def test_weights_move_by_16_bytes_on_amd(compiled) -> None:
    def law(case: Case, found: Resources) -> bool:
        wide = found.count("buffer_load.128", "global_load.128") * 16 * 64 * found.num_warps
        return nvidia(case) or wide >= case.weights or case.kernel in ("combine", "sum_pairs")

    assert keep(compiled, law)


def test_descriptors_are_used_where_asked_for(compiled) -> None:
    def law(case: Case, found: Resources) -> bool:
        return bool(found.count("UTMALDG")) is bool(case.launched.options.get("TMA"))

    assert keep(compiled, law)


def test_int8_weights_become_values_in_registers(compiled) -> None:
    """Shared memory holds the ring of both operands as they lie in memory, and nothing of their size else."""

    def law(case: Case, found: Resources) -> bool:
        given = case.launched.options
        if not case.spec.int8 or not nvidia(case) or not case.first:
            return True
        dtypes = [a.dtype for a in case.launched.args if isinstance(a, Tensor)]
        rows = given["BLOCK_T"] * given["BLOCK_K"] * case.spec.itemsize
        ring = (given["num_stages"] - 1) * (case.weights + rows)
        return torch.int8 in dtypes and found.shared <= ring + 64

    assert any(case.spec.int8 for case, _ in compiled)
    assert keep(compiled, law)


def test_results_leave_by_16_bytes(compiled) -> None:
    """Of tiles with as many bytes for every thread."""

    def law(case: Case, found: Resources) -> bool:
        whole = 16 * 32 * found.num_warps
        stored = found.instructions.get("STG.128", 0) * whole
        return not nvidia(case) or case.result < whole or stored >= case.result

    assert keep(compiled, law)


def test_sums_are_added_as_the_target_can(compiled) -> None:
    """Hopper adds four fp32 at once; older ones one; nowhere a loop of compare-and-swap."""

    def law(case: Case, found: Resources) -> bool:
        if not case.launched.options.get("ATOMIC"):
            return not found.count("RED")
        name = {"sm_80": "RED.F32", "sm_90": "RED.F32x4", "gfx942": "atomic.add_f32"}[case.target]
        return found.instructions.get(name, 0) > 0

    assert keep(compiled, law)
    assert keep(compiled, lambda case, found: "ATOM.CAS" not in found.instructions)


def figures(case: Case, found: Resources) -> dict[str, Any]:
    config = {k: v for k, v in case.launched.options.items() if k != "enable_fp_fusion"}
    return {
        "config": " ".join(f"{name.lower()}={int(value)}" for name, value in config.items()),
        "registers": found.registers,
        "shared": found.shared,
        "instructions": found.instructions["total"],
    }


def near(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    total = expected["instructions"]
    return (
        (found["config"], found["shared"]) == (expected["config"], expected["shared"])
        and abs(found["registers"] - expected["registers"]) <= REGISTERS
        and abs(found["instructions"] - total) <= INSTRUCTIONS * total
    )


def triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def test_golden_figures(compiled) -> None:
    held = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    found = {case.name: figures(case, resources) for case, resources in compiled}
    if os.environ.get("UPDATE_EXPECTED") == "1":
        held[triton_version()] = found
        lines = [
            f"  {json.dumps(name)}: {{\n"
            + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items())
            + "\n  }"
            for name, kept in sorted(held.items())
        ]
        EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if triton_version() not in held:
        pytest.skip(f"figures are of Triton {', '.join(held)}, not of {triton_version()}")
    expected = held[triton_version()]
    assert found.keys() == expected.keys(), "UPDATE_EXPECTED=1 accepts the new launches"
    differ = {n: (found[n], expected[n]) for n in found if not near(found[n], expected[n])}
    assert not differ, f"{EXPECTED} differs; UPDATE_EXPECTED=1 accepts the new figures"
