"""emit: the C++ of an activation computes what torch computes, on every kind of vectors."""

import ctypes
import itertools
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from d2dcompile import kernels
from d2dcompile.errors import KernelError
from d2dcompile.expr import function, parse
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
EXAMPLES = """
relu(up)
relu(up) ** 2
square(relu(up))
relu6(up)
gelu(up)
gelu(up, approximate='tanh')
gelu(gate) * up
gelu(gate, approximate='tanh') * up
silu(up)
silu(gate) * up
cast(silu(cast(gate, dtype='float32')), dtype='bfloat16') * up
up * sigmoid(1.702 * up)
0.5 * up * (1 + tanh(0.7978845608028654 * (up + 0.044715 * pow(up, 3))))
up * 0.5 * (1.0 + erf(up / 1.4142135623730951))
up * 0.5 * (1.0 + tanh(up * 0.7978845608 * (1.0 + 0.044715 * up * up)))
sigmoid(up)
tanh(up)
mish(up)
softplus(up)
softplus(up, beta=2.0, threshold=0.5)
softsign(up)
logsigmoid(up)
leaky_relu(up)
leaky_relu(up, negative_slope=-0.3)
elu(up)
elu(up, alpha=0.7)
selu(up)
celu(up)
celu(up, alpha=0.7)
hardtanh(up)
hardtanh(up, min_val=-0.4, max_val=0.3)
hardswish(up)
hardsigmoid(up) * gate
hardshrink(up)
softshrink(up, lambd=0.2)
tanhshrink(up)
threshold(up, threshold=0.25, value=-2.0)
prelu(up, p0)
where(gt(up, 0), p0 * up * up + p1 * up, (expm1(minimum(up, -1e-06)) - up) * p2 + p1 * up)
where(gt(up, 0), up, p0 * up)
(clamp(up, min=-7.0, max=7.0) + 1) * minimum(gate, 7.0) * sigmoid(minimum(gate, 7.0) * 1.702)
(clamp(up, min=-7.0, max=7.0) + 1) * silu(clamp(gate, max=7.0))
clamp(up, min=0.0)
p0 * tanh(p1 * up)
p0 * up * sigmoid(p1 * gate)
maximum(up, gate) - minimum(up, 0.25)
maximum(up, 0.0) + log1p(exp(-abs(up)))
up * tanh(log1p(exp(clamp(up, max=20.0))))
exp(up)
expm1(up)
log(abs(up))
log1p(abs(up))
sqrt(abs(up))
rsqrt(abs(up) + 1)
reciprocal(up)
erf(up)
sin(clamp(up, min=-50, max=50))
cos(clamp(up, min=-50, max=50))
sign(up) * gate
-up / gate
pow(abs(up) + 0.1, 0.3125)
pow(abs(up) + 0.1, p0)
pow(1.5, clamp(up, max=9))
pow(up, 4) - pow(up, -1)
pow(abs(up) + 0.1, -0.5) + pow(abs(gate), 0.5)
gt(up, 0) * up
(ge(up, gate) + lt(up, -1)) * up
le(up, gate) * gt(up, 0) + 0.5 * gate
where(le(up, 0.5) * True, gt(gate, 0), lt(gate, -1)) + up
up * cast(gt(up, gate), dtype='float16')
exp(-square(up))
sqrt(softplus(up)) * 1e-40
""".strip().splitlines()
SCALARS = (0.8125, 1.3, -0.37)  # p0, p1, p2
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


def grid():
    """(up, gate), fp32: evenly spaced, and of every magnitude from denormals to 1e30."""
    generator = torch.Generator().manual_seed(0)
    even = torch.linspace(-12, 12, 16384)
    magnitudes = torch.logspace(-44, 30, 2048)
    up = torch.cat([even, magnitudes, -magnitudes, -torch.logspace(0, 2.2, 512)])
    gate = torch.randn(len(up), generator=generator) * 3
    return up, gate


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


def torch_value(text, up, gate):
    scalars = {f"p{i}": torch.tensor(s).to(up.dtype) for i, s in enumerate(SCALARS)}
    return function(text)({"up": up, "gate": gate, **scalars}).to(up.dtype)


def exact_value(text, up, gate):
    """The value in fp64, casts included, and with no 1 + tanh(z), which fp64 loses from z = -19 on."""
    text = re.sub(r"'b?float[0-9]+'", "'float64'", text)
    sigmoid = r"(\1 * sigmoid(1.5957691216057308 * (\1 + 0.044715 * \1 ** 3)))"
    text = re.sub(r"gelu\((\w+), approximate='tanh'\)", sigmoid, text)
    return torch_value(text, up.double(), gate.double())


def rms(error):
    return error.square().mean().sqrt().item()


@pytest.mark.parametrize("text", EXAMPLES)
def test_is_as_exact_as_torch(call, text):
    up, gate = grid()
    ours, eager = call(text, up, gate).double(), torch_value(text, up, gate).double()
    exact = exact_value(text, up, gate)
    bounds = [-math.inf, -5, -2, -1, -0.1, 0, 0.1, 1, 2, 5, math.inf]
    for low, high in itertools.pairwise(bounds):
        here = (up >= low) & (up < high) & eager.isfinite() & exact.isfinite()
        for unit in (exact.abs().clamp(min=1e-38), exact.new_ones(len(up))):
            mine, theirs = (rms(((y - exact) / unit)[here]) for y in (ours, eager))
            assert mine <= 2 * theirs, f"{text} in {low}..{high}: {mine} > 2 x {theirs}"


@pytest.mark.parametrize("text", EXAMPLES)
def test_special_values_come_out_as_from_torch(call, text):
    values = [
        math.nan,
        math.inf,
        -math.inf,
        0.0,
        -0.0,
        1.5,
        -1.5,
        200.0,
        -200.0,
        3e38,
        -3e38,
        1e-44,
    ]
    up, gate = torch.cartesian_prod(*[torch.tensor(values)] * 2).T.contiguous()
    ours = call(text, up, gate)
    text = re.sub(r"'b?float[0-9]+'", "'float32'", text)
    eager, exact = (
        torch_value(text, up, gate),
        torch_value(text, up.double(), gate.double()).float(),
    )
    same = torch.isclose(ours, eager, rtol=1e-6, atol=1e-37, equal_nan=True)
    # torch's own vectors lose infinity in places, e.g. gelu(inf) is NaN with AVX-512.
    same |= torch.isclose(ours, exact, rtol=1e-6, atol=1e-37, equal_nan=True)
    wrong = [
        (up[i].item(), gate[i].item(), ours[i].item(), eager[i].item()) for i in (~same).nonzero()
    ]
    assert not wrong, f"{text}: (up, gate, ours, torch's) {wrong}"


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


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("up * noise", "noise"),
        ("cast(up, dtype='int32') * 1.0", "torch.int32"),
        ("cast(up, dtype='bool') * 1.0", "torch.bool"),
        ("cast(up, dtype='float8_e4m3fn') * 1.0", "float8_e4m3fn"),
        ("threshold(up, threshold=0.5)", "threshold"),
        ("clamp(up)", "clamp"),
    ],
)
def test_what_has_no_spelling_is_refused(text, seen):
    with pytest.raises(KernelError, match=rf"{seen}.* reference path"):
        activation_source(text)


def test_an_operator_without_spelling_is_refused(monkeypatch):
    monkeypatch.setitem(OPERATORS, "exp", type(OPERATORS["exp"])(torch.exp))
    with pytest.raises(KernelError, match="exp has no C\\+\\+ spelling"):
        activation_source("exp(up)")
