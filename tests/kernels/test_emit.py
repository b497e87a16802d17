"""emit: the C++ of an activation computes what torch computes, on every kind of vectors."""

import ctypes
import math
import shutil
import subprocess
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
from d2dcompile.expr import parse
from d2dcompile.kernels.emit import activation_source
from d2dcompile.operators import OPERATORS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
INCLUDE = Path(kernels.__file__).parent / "cpu"
BUILDS = {
    "native": ["-march=native"],
    "avx2": ["-mavx2", "-mfma"],
    "plain": [],
    # With what torch 2.13's Inductor adds: less care for -0, no contraction to FMA.
    "inductor": ["-mavx2", "-mfma", "-fno-signed-zeros", "-fno-trapping-math", "-ffp-contract=off"],
}
VECTOR = 16  # the widest vector; arrays are whole ones
CALL = """
extern "C" void f{0}(const float* up, const float* gate, const float* p, float* out, int64_t n) {{
    for (int64_t i = 0; i < n; i += VL) {{
        vf u, g;
        std::memcpy(&u, up + i, sizeof u);
        std::memcpy(&g, gate + i, sizeof g);
        const vf y = a{0}(u, g, p);
        std::memcpy(out + i, &y, sizeof y);
    }}
}}
"""


@pytest.fixture(scope="module", params=BUILDS)
def call(request, tmp_path_factory):
    """A function (text, up, gate) that runs the compiled activation of one of EXAMPLES."""
    folder = tmp_path_factory.mktemp(request.param)
    source = '#include "vec.h"\n'
    for i, text in enumerate(EXAMPLES):
        source += activation_source(text, name=f"a{i}") + CALL.format(i)
    (folder / "source.cpp").write_text(source)
    command = [
        "g++",
        "-O2",
        "-std=c++17",
        "-shared",
        "-fPIC",
        f"-I{INCLUDE}",
        *BUILDS[request.param],
    ]
    subprocess.run([*command, "source.cpp", "-o", "library.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "library.so"))

    def run(text, up, gate):
        out, p = torch.full_like(up, math.nan), torch.tensor(SCALARS)
        assert len(up) % VECTOR == 0
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (up, gate, p, out)]
        getattr(library, f"f{EXAMPLES.index(text)}")(*pointers, ctypes.c_int64(len(up)))
        return out

    return run


@pytest.mark.parametrize("text", EXAMPLES)
def test_is_as_exact_as_torch(call, text):
    up, gate = grid()
    assert_as_exact_as_torch(text, up, gate, call(text, up, gate))


@pytest.mark.parametrize("text", EXAMPLES)
def test_special_values_come_out_as_from_torch(call, text):
    up, gate = specials()
    assert_specials_as_from_torch(text, up, gate, call(text, up, gate))


def operators(e):
    if e.op in ("var", "const"):
        return set()
    return {e.op}.union(*map(operators, e.args))


def test_every_operator_has_an_example():
    seen = set().union(*(operators(parse(text)) for text in EXAMPLES))
    assert seen == set(OPERATORS)


def test_text_of_a_gated_activation():
    assert activation_source("silu(gate) * up") == (
        "static inline vf activation([[maybe_unused]] vf up, [[maybe_unused]] vf gate, "
        "[[maybe_unused]] const float* p) {\n"
        "    const vf t0 = silu(gate);\n"
        "    const vf t1 = t0 * up;\n"
        "    return t1;\n"
        "}\n"
    )


def test_text_with_parts_shared_masks_and_scalars():
    source = activation_source("where(gt(up, 0), p1 * up ** 2, 0.1 * (p1 * up ** 2)) + gt(up, 0)")
    assert source.splitlines()[1:-1] == [
        "    const vi t0 = up > splat(0.0f);",
        "    const vf t1 = splat(p[1]);",
        "    const vf t2 = square(up);",
        "    const vf t3 = t1 * t2;",
        "    const vf t4 = splat(0.1f) * t3;",
        "    const vf t5 = where(t0, t3, t4);",
        "    const vf t6 = t5 + number(t0);",
        "    return t6;",
    ]


@pytest.mark.parametrize(
    ("text", "spelt"),
    [
        ("up * 1.702", "splat(1.702f)"),
        ("up * 3", "splat(3.0f)"),
        ("up * -0.0", "splat(-0.0f)"),
        ("up * 0.044715000000000005", "splat(0.044715f)"),
        ("up * 16777217", "splat(16777216.0f)"),
        ("up * 1e300", "splat(HUGE_VALF)"),
        ("up * True", "number(mask(true))"),
    ],
)
def test_numbers_are_spelt_as_fp32(text, spelt):
    assert spelt in activation_source(text)


@pytest.mark.parametrize(("text", "seen"), REFUSED)
def test_what_has_no_spelling_is_refused(text, seen):
    with pytest.raises(KernelError, match=rf"{seen}.* reference path"):
        activation_source(text)


def test_an_operator_without_spelling_is_refused(monkeypatch):
    monkeypatch.setitem(OPERATORS, "exp", type(OPERATORS["exp"])(torch.exp))
    with pytest.raises(KernelError, match="exp has no C\\+\\+ spelling"):
        activation_source("exp(up)")
