"""emit: the Triton of an activation computes what torch computes, and compiles for GPUs without one.

Kernels of several activations each run in Triton's interpreter, and are compiled ahead of time. Both
happen in processes of their own, as Triton reads TRITON_INTERPRET when it is imported.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from activations import (
    EXAMPLES,
    REFUSED,
    SCALARS,
    assert_as_exact_as_torch,
    assert_specials_as_from_torch,
    grid,
    specials,
)

from d2dcompile import kernels
from d2dcompile.errors import KernelError
from d2dcompile.kernels.emit import activation_source, library_source
from d2dcompile.operators import OPERATORS

MATH = Path(kernels.__file__).parent / "gpu" / "math.py"
EACH = 13  # activations of a kernel
IMPORTS = "import triton\nimport triton.language as tl\n"
KERNEL = """
@triton.jit
def k{0}(up_ptr, gate_ptr, out_ptr, n, p0, p1, p2, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs < n
    up = tl.load(up_ptr + offs, mask_n)
"""
GATE = "    gate = tl.load(gate_ptr + offs, mask_n)\n"
CALL = "    tl.store(out_ptr + {0} * n + offs, a{0}(up, gate, (p0, p1, p2)), mask_n)\n"
# An activation that reads neither gate nor scalars is given neither.
BARE = "    tl.store(out_ptr + offs, bare(up, up, ()), mask_n)\n"
INTERPRET = f"""
import numpy, torch, generated
numpy.seterr(all="ignore")
up, gate = torch.load("inputs.pt")
out = torch.full(({len(EXAMPLES)}, len(up)), torch.nan)
for first in range(0, {len(EXAMPLES)}, {EACH}):
    kernel = getattr(generated, f"k{{first}}")
    kernel[(-(-len(up) // 4096),)](up, gate, out, len(up), *{SCALARS}, BLOCK=4096)
torch.save(out, "outputs.pt")
bare = torch.empty_like(up)
generated.kbare[(1,)](up, None, bare, len(up), 0.0, 0.0, 0.0, BLOCK=32768)
torch.testing.assert_close(bare, up.relu(), rtol=0, atol=0, equal_nan=True)
"""
# Prints, per kernel and target: its name, bytes of stack, and what is spilt.
COMPILE = """
import re, subprocess, triton, generated
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
types = dict.fromkeys(("up_ptr", "gate_ptr", "out_ptr"), "*fp32") | {"n": "i32"}
types |= dict.fromkeys(("p0", "p1", "p2"), "fp32") | {"BLOCK": "constexpr"}
cuobjdump = triton.knobs.nvidia.cuobjdump.path
for name, kernel in vars(generated).items():
    if not re.fullmatch("k[0-9]+|kbare", name):
        continue
    source = ASTSource(kernel, types, {"BLOCK": 1024})
    cuda = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    with open("kernel.cubin", "wb") as file:
        file.write(cuda.asm["cubin"])
    command = [cuobjdump, "--dump-resource-usage", "kernel.cubin"]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(name, *re.findall("(?:STACK|LOCAL):([0-9]+)", usage))
    hip = triton.compile(source, target=GPUTarget("hip", "gfx942", 64))
    number = r"\\.(?:private_segment_fixed_size|[sv]gpr_spill_count): +([0-9]+)"
    print(name, *re.findall(number, hip.asm["amdgcn"]))
"""


def generated() -> str:
    """Module text: the library, the activations a<i>, and kernels of EACH of them."""
    source = f"{IMPORTS}\n\n{library_source(*EXAMPLES, 'relu(up)')}"
    source += activation_source("relu(up)", name="bare", language="triton")
    for i, text in enumerate(EXAMPLES):
        source += activation_source(text, name=f"a{i}", language="triton")
    for first in range(0, len(EXAMPLES), EACH):
        source += KERNEL.format(first) + GATE
        source += "".join(map(CALL.format, range(first, min(first + EACH, len(EXAMPLES)))))
    return source + KERNEL.format("bare") + BARE


def run(code: str, folder: Path, **env: str) -> str:
    (folder / "generated.py").write_text(generated())
    rest = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**rest, "TRITON_CACHE_DIR": str(folder / "cache"), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """{text: (values on grid(), values on specials())} of the activations, interpreted."""
    folder = tmp_path_factory.mktemp("triton")
    up, gate = (torch.cat(pair) for pair in zip(grid(), specials(), strict=True))
    torch.save((up, gate), folder / "inputs.pt")
    run(INTERPRET, folder, TRITON_INTERPRET="1")
    outputs = torch.load(folder / "outputs.pt")
    pairs = outputs.split((len(grid()[0]), len(specials()[0])), dim=1)
    return dict(zip(EXAMPLES, zip(*pairs, strict=True), strict=True))


@pytest.mark.triton
@pytest.mark.parametrize("text", EXAMPLES)
def test_is_as_exact_as_torch(values, text):
    assert_as_exact_as_torch(text, *grid(), values[text][0])


@pytest.mark.triton
@pytest.mark.parametrize("text", EXAMPLES)
def test_special_values_come_out_as_from_torch(values, text):
    assert_specials_as_from_torch(text, *specials(), values[text][1])


@pytest.mark.triton
def test_compiles_for_cuda_and_hip_and_spills_nothing(tmp_path):
    used = [line.split() for line in run(COMPILE, tmp_path).splitlines()]
    cuda, hip = used[::2], used[1::2]
    assert len(cuda) == len(hip) == -(-len(EXAMPLES) // EACH) + 1
    # sin and cos may keep 28 bytes on the stack, to reduce arguments beyond 1e5; Triton 3.9 sees the clamp.
    stacks = [(name, int(stack), int(local)) for name, stack, local in cuda]
    assert not [it for it in stacks if it[1] > 32 or it[2]]
    assert not [it for it in hip if it[1:] != ["0", "0", "0"]]


def test_text_with_parts_shared_masks_and_scalars():
    text = "where(gt(up, 0), p1 * up ** 2, clamp(p1 * up ** 2, max=0.1)) + gt(up, 0) * True"
    assert activation_source(text, language="triton") == (
        "@triton.jit\n"
        "def activation(up, gate, p):\n"
        "    t0 = up > splat(0.0)\n"
        "    t1 = splat(p[1])\n"
        "    t2 = square(up)\n"
        "    t3 = t1 * t2\n"
        "    t4 = clamp(t3, None, 0.1)\n"
        "    t5 = where(t0, t3, t4)\n"
        "    t6 = t0 & mask(True)\n"
        "    t7 = t5 + number(t6)\n"
        "    return t7\n"
    )


@pytest.mark.parametrize(
    ("text", "spelt"),
    [
        ("up * 3", "splat(3.0)"),
        ("up * 0.044715000000000005", "splat(0.044715)"),
        ("up * 1e300", 'splat(float("inf"))'),
        ("hardtanh(up, min_val=-1e300)", 'hardtanh(up, -float("inf"), 1.0)'),
        ("up * False", "number(mask(False))"),
    ],
)
def test_numbers_are_spelt_as_fp32(text, spelt):
    assert spelt in activation_source(text, language="triton")


@pytest.mark.parametrize(("text", "seen"), REFUSED)
def test_what_has_no_spelling_is_refused(text, seen):
    message = rf"{seen}.* no Triton spelling.* reference path"
    with pytest.raises(KernelError, match=message):
        activation_source(text, language="triton")
    with pytest.raises(KernelError, match=message):
        library_source(text)


def test_an_operator_without_spelling_is_refused(monkeypatch):
    monkeypatch.setitem(OPERATORS, "exp", type(OPERATORS["exp"])(torch.exp))
    with pytest.raises(KernelError, match="exp has no Triton spelling"):
        activation_source("exp(up)", language="triton")


def names(source: str) -> tuple[list[str], set[str]]:
    """(functions that a source text defines, in order; functions that it calls by name)."""
    nodes = list(ast.walk(ast.parse(source)))
    calls = (node.func for node in nodes if isinstance(node, ast.Call))
    called = {function.id for function in calls if isinstance(function, ast.Name)}
    return [node.name for node in nodes if isinstance(node, ast.FunctionDef)], called


@pytest.mark.parametrize("text", EXAMPLES)
def test_library_is_what_an_activation_calls_and_no_more(text):
    source = activation_source(text, language="triton")
    defined, called = names(library_source(text) + source)
    assert called <= {*defined, "len", "float"}
    assert set(defined) == {"activation", *called} - {"len", "float"}
    assert defined[:-1] == [name for name in names(MATH.read_text())[0] if name in defined]


def test_library_of_several_activations_has_each_function_once():
    both = library_source("silu(gate) * up", "sigmoid(up)")
    assert names(both)[0] == [
        "splat",
        "nearest",
        "power_of_two",
        "remainder",
        "exp",
        "sigmoid",
        "silu",
    ]
    assert library_source("up * gate") == ""


def test_every_function_is_called_by_some_activation():
    # torch refuses numbers as conditions, so no example has one; their spelling is `nonzero`.
    everything = library_source(*EXAMPLES, "where(up, gate, 0.5)")
    assert names(everything)[0] == names(MATH.read_text())[0]
