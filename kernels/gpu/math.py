"""Elementwise Triton functions of fp32 values: one for each operator of d2dcompile.operators.

Read as text and never imported: kernels/emit.py copies the functions that an activation calls into the
file it generates, where they are jitted. Names and meanings are those of kernels/cpu/vec.h. NaN and
infinities come out as from torch. Everything runs in Triton's interpreter, hence no libdevice.

On a GPU, tl.exp(x) is 2^(x log2 e) of a rounded product (4e-6 off at e^80), fp32 `/` has two units in
the last place, and tl.sqrt takes denormals for 0; what is called here is as exact as vec.h. Products are
contracted by tl.fma, where it helps, not by an option of the compiler. Polynomials and bounds of errors
are those of vec.h.
"""

import triton
import triton.language as tl

# ---- Numbers and masks.


@triton.jit
def splat(x):
    return tl.full((), x, tl.float32)


@triton.jit
def mask(x):
    return tl.full((), x, tl.int1)


@triton.jit
def nonzero(x):
    return x != 0.0


@triton.jit
def number(mask):
    return mask.to(tl.float32)


@triton.jit
def where(mask, a, b):
    return tl.where(mask, a, b)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


# ---- Arithmetic.


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def with_sign(size, x):
    return tl.where(x < 0.0, -size, size)


@triton.jit
def sign(x):
    return number(x > 0.0) - number(x < 0.0)


@triton.jit
def square(x):
    return x * x


@triton.jit
def cube(x):
    return x * x * x


@triton.jit
def fourth(x):
    # In fp64, to be rounded once.
    wide = x.to(tl.float64)
    squared = wide * wide
    return (squared * squared).to(tl.float32)


@triton.jit
def reciprocal(x):
    return 1.0 / x


@triton.jit
def sqrt(x):
    return tl.sqrt_rn(x)


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt_rn(x)


@triton.jit
def pow(x, y):
    # By way of log2 in fp64, whose error y log2 x would multiply. A negative x has powers of whole y
    # only, negative ones of odd y, and an infinity is even.
    x, y = tl.broadcast(x, y)
    size = tl.exp2(y.to(tl.float64) * tl.log2(tl.abs(x).to(tl.float64))).to(tl.float32)
    size = tl.where((y == 0.0) | (tl.abs(x) == 1.0), 1.0, size)
    half = 0.5 * y
    odd = (tl.floor(y) == y) & (tl.floor(half) != half)
    size = tl.where(odd & (x.to(tl.int32, bitcast=True) < 0), -size, size)
    none = (x < 0.0) & (x != float("-inf")) & (tl.floor(y) != y)
    return tl.where(none, float("nan"), size)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def sin(x):
    return tl.sin(x)


@triton.jit
def cos(x):
    return tl.cos(x)


@triton.jit
def polynomial(x, c):
    """c[0] + c[1] x + ... by Horner's rule."""
    total = splat(c[len(c) - 1])
    for i in tl.static_range(len(c) - 2, -1, -1):
        total = tl.fma(total, x, splat(c[i]))
    return total


# ---- Exponentials and logarithms.


@triton.jit
def nearest(x):
    """The nearest integer, for |x| < 2^22: from 1.5 2^23 on, fp32 has no fractions."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def power_of_two(n):
    """2^n for whole n, -127 < n < 128: n is in the low bits of 1.5 2^23 + n."""
    bits = (n + 12582912.0).to(tl.int32, bitcast=True)
    return ((bits + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def remainder(x, n):
    """x - n ln 2, ln 2 in two parts, the first short enough for its product with n to be exact."""
    return tl.fma(n, splat(2.12194440e-4), tl.fma(n, splat(-0.693359375), x))


@triton.jit
def exp(x):
    # Where n is at its bound, the remainder is large, and tl.exp2 takes care of what it is.
    n = nearest(tl.minimum(tl.maximum(x * 1.44269504, -126.0), 126.0))
    return tl.exp2(remainder(x, n) * 1.44269504) * power_of_two(n)


@triton.jit
def expm1(x):
    # 2 (2^(n - 1) (1 + rest) - 1/2): 2^n itself may overflow where the result does not.
    bounded = minimum(maximum(x, -30.0), 88.9)
    n = nearest(bounded * 1.44269504)
    r = remainder(bounded, n)
    c = (0.49999997, 0.166665435, 0.0416672006, 0.00836658012, 0.00138825073)
    rest = tl.fma(r * r, polynomial(r, c), r)
    half = power_of_two(n - 1.0)
    return tl.where(tl.abs(x) < 1e-7, x, 2.0 * tl.fma(half, rest, half - 0.5))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def silu(x):
    return x / (1.0 + exp(-x))


@triton.jit
def mish(x):
    # tanh(ln(1 + e)) = e (e + 2) / (e (e + 2) + 2), which is 1 from e^20 on.
    e = exp(minimum(x, 20.0))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


@triton.jit
def tanh(x):
    t = tl.abs(x)
    s = x * x
    c = (-0.333332777, 0.133313313, -0.0537300073, 0.0206061807, -0.00566698052)
    small = tl.fma(x * s, polynomial(s, c), x)
    return tl.where(t < 0.625, small, with_sign(1.0 - 2.0 / (1.0 + exp(2.0 * t)), x))


@triton.jit
def log1p_small(x):
    """ln(1 + x) = 2 artanh(s) with s = x / (2 + x), for -1/2 <= x <= 1."""
    s = x / (2.0 + x)
    z = s * s
    p = polynomial(z, (0.666664183, 0.400215268, 0.280018121, 0.280119598))
    return tl.fma(s * z, p, s + s)


@triton.jit
def log1p(x):
    # Of large x: ln of the rounded sum, and what the rounding took.
    total = 1.0 + x
    lost = x - (total - 1.0)
    large = tl.log(total) + tl.where(tl.abs(lost) > 0.0, lost / total, 0.0)
    return tl.where((x >= -0.5) & (x <= 1.0), log1p_small(x), large)


@triton.jit
def softness(x):
    """ln(1 + e^-|x|)."""
    return log1p_small(exp(-tl.abs(x)))


@triton.jit
def softplus(x, beta, threshold):
    z = x * beta
    return tl.where(z > threshold, x, (maximum(z, 0.0) + softness(z)) / beta)


@triton.jit
def logsigmoid(x):
    return minimum(x, 0.0) - softness(x)


# ---- The normal distribution.


@triton.jit
def erf(x):
    return tl.erf(x)


@triton.jit
def erfc(t):
    """1 - erf(t) for t >= 0, as a power of two: log2 of it is nearly a parabola. 0 from t = 4 on (1.5e-8)."""
    low = (-1.62790775, -0.91843462, -0.148359179, 0.0278721005, -0.000142126752)
    high = (-0.00207820581, 0.000752537395, -0.000128657892, 9.10965809e-06)
    w = polynomial(t, low + high)
    return tl.where(t > 4.0, 0.0, tl.exp2(t * w))


@triton.jit
def gelu_none(x):
    tail = 0.5 * erfc(tl.abs(x) * 0.707106781)
    return x * tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def gelu_tanh(x):
    # (1 + tanh(z)) / 2 = sigmoid(2 z), 2 z = sqrt(8 / pi) (x + 0.044715 x^3).
    return x * sigmoid(x * tl.fma(x * x, splat(0.0713548163), splat(1.59576912)))


# ---- Pieces of lines and exponentials.


@triton.jit
def clamp(x, low, high):
    if low is not None:
        x = maximum(x, splat(low))
    if high is not None:
        x = minimum(x, splat(high))
    return x


@triton.jit
def relu(x):
    return maximum(x, 0.0)


@triton.jit
def relu6(x):
    return clamp(x, 0.0, 6.0)


@triton.jit
def hardtanh(x, low, high):
    return clamp(x, low, high)


@triton.jit
def hardsigmoid(x):
    return clamp(x + 3.0, 0.0, 6.0) / 6.0


@triton.jit
def hardswish(x):
    return x * clamp(x + 3.0, 0.0, 6.0) / 6.0


@triton.jit
def hardshrink(x, lambd):
    return tl.where((x >= -lambd) & (x <= lambd), 0.0, x)


@triton.jit
def softshrink(x, lambd):
    return tl.where(tl.abs(x) <= lambd, 0.0, x - with_sign(splat(lambd), x))


@triton.jit
def softsign(x):
    return x / (1.0 + tl.abs(x))


@triton.jit
def tanhshrink(x):
    return x - tanh(x)


@triton.jit
def threshold(x, threshold, value):
    return tl.where(x <= threshold, splat(value), x)


@triton.jit
def prelu(x, slope):
    return tl.where(x > 0.0, x, x * slope)


@triton.jit
def leaky_relu(x, slope):
    return tl.where(x > 0.0, x, x * slope)


@triton.jit
def elu(x, alpha):
    return tl.where(x > 0.0, x, alpha * expm1(x))


@triton.jit
def celu(x, alpha):
    return tl.where(x > 0.0, x, alpha * expm1(x / alpha))


@triton.jit
def selu(x):
    return tl.where(x > 0.0, 1.05070099 * x, 1.75809934 * expm1(x))
