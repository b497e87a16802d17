"""Forms of activations for the tests of generated code, and the checks of the values it computes."""

import itertools
import math
import re

import torch
from torch import Tensor

from d2dcompile.expr import function

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
pow(up, gate)
where(gt(p0, 0.5), exp(p1) * up, maximum(gate, 1e-40))
""".strip().splitlines()
# What generated code has no spelling for, and what the message names.
REFUSED = [
    ("up * noise", "noise"),
    ("cast(up, dtype='int32') * 1.0", "torch.int32"),
    ("cast(up, dtype='bool') * 1.0", "torch.bool"),
    ("cast(up, dtype='float8_e4m3fn') * 1.0", "float8_e4m3fn"),
    ("threshold(up, threshold=0.5)", "threshold"),
    ("clamp(up)", "clamp"),
]
SCALARS = (0.8125, 1.3, -0.37)  # p0, p1, p2


def grid() -> tuple[Tensor, Tensor]:
    """(up, gate), fp32: evenly spaced, and of every magnitude from denormals to 1e30."""
    generator = torch.Generator().manual_seed(0)
    even = torch.linspace(-20, 20, 16384)
    magnitudes = torch.logspace(-44, 30, 2048)
    up = torch.cat([even, magnitudes, -magnitudes, -torch.logspace(0, 2.2, 512)])
    gate = torch.randn(len(up), generator=generator) * 3
    return up, gate


def specials() -> tuple[Tensor, Tensor]:
    """(up, gate), fp32: every pair of NaN, infinities, zeros of both signs, tiny and huge numbers."""
    sizes = (0.0, 1.5, 200.0, 3e38, math.inf)
    values = torch.tensor([*sizes, *(-size for size in sizes), math.nan, 1e-44])
    up, gate = torch.cartesian_prod(values, values).T.contiguous()
    return up, gate


def torch_value(text: str, up: Tensor, gate: Tensor) -> Tensor:
    scalars = {f"p{i}": torch.tensor(s).to(up.dtype) for i, s in enumerate(SCALARS)}
    return function(text)({"up": up, "gate": gate, **scalars}).to(up.dtype)


def exact_value(text: str, up: Tensor, gate: Tensor) -> Tensor:
    """The value in fp64, casts included, and with no 1 + tanh(z), which fp64 loses from z = -19 on."""
    text = re.sub(r"'b?float[0-9]+'", "'float64'", text)
    sigmoid = r"(\1 * sigmoid(1.5957691216057308 * (\1 + 0.044715 * \1 ** 3)))"
    text = re.sub(r"gelu\((\w+), approximate='tanh'\)", sigmoid, text)
    return torch_value(text, up.double(), gate.double())


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def assert_as_exact_as_torch(text: str, up: Tensor, gate: Tensor, ours: Tensor) -> None:
    """RMS errors, relative and absolute, are <= 2 x those of eager fp32 in every range of `up`."""
    ours, eager = ours.double(), torch_value(text, up, gate).double()
    exact = exact_value(text, up, gate)
    bounds = [-math.inf, -5, -2, -1, -0.1, 0, 0.1, 1, 2, 5, math.inf]
    for low, high in itertools.pairwise(bounds):
        here = (up >= low) & (up < high) & eager.isfinite() & exact.isfinite()
        if not here.any():  # powers of negative numbers
            continue
        for unit in (exact.abs().clamp(min=1e-38), exact.new_ones(len(up))):
            mine, theirs = (rms(((y - exact) / unit)[here]) for y in (ours, eager))
            assert mine <= 2 * theirs, f"{text} in {low}..{high}: {mine} > 2 x {theirs}"


def assert_specials_as_from_torch(text: str, up: Tensor, gate: Tensor, ours: Tensor) -> None:
    """NaN, infinities, and where numbers are tiny or huge, are those of eager torch, in fp32 or fp64."""
    text = re.sub(r"'b?float[0-9]+'", "'float32'", text)
    eager = torch_value(text, up, gate)
    exact = torch_value(text, up.double(), gate.double()).float()
    same = torch.isclose(ours, eager, rtol=1e-6, atol=1e-37, equal_nan=True)
    # torch's own vectors lose infinity in places, e.g. gelu(inf) is NaN with AVX-512.
    same |= torch.isclose(ours, exact, rtol=1e-6, atol=1e-37, equal_nan=True)
    wrong = [
        (up[i].item(), gate[i].item(), ours[i].item(), eager[i].item()) for i in (~same).nonzero()
    ]
    assert not wrong, f"{text}: (up, gate, ours, torch's) {wrong}"
