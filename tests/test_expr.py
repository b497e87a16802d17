"""Activation texts: what is written is read back, what is read is what torch computes, nothing else."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2dcompile.errors import ExpressionError
from d2dcompile.expr import (
    MAX_DEPTH,
    MAX_LENGTH,
    MAX_SIZE,
    Expr,
    const,
    evaluate,
    function,
    parse,
    quiet,
    var,
    vjp,
    without_casts,
)
from d2dcompile.operators import OPERATORS

BOUNDED = settings(max_examples=80, deadline=None)
VARIABLES = st.sampled_from(["up", "gate", "p0", "p1", "p12"]).map(var)
NUMBERS = st.one_of(
    st.booleans(),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
).map(const)
INFIX = ("add", "sub", "mul", "div", "pow")
# Parameters that differ from the defaults, for every operator that has any.
PARAMS = {
    "gelu": {"approximate": "tanh"},
    "softplus": {"beta": 2.0, "threshold": 0.5},
    "leaky_relu": {"negative_slope": -0.3},
    "elu": {"alpha": 0.7},
    "celu": {"alpha": 0.7},
    "hardtanh": {"min_val": -0.4, "max_val": 0.3},
    "hardshrink": {"lambd": 0.2},
    "softshrink": {"lambd": 0.2},
    "threshold": {"threshold": 0.25, "value": -2.0},
    "clamp": {"min": -0.4, "max": 0.6},
    "cast": {"dtype": "float32"},
}


def grow(inner):
    """Operators over expressions of which at least one reads a variable."""
    return st.one_of(
        st.builds(lambda a: Expr("neg", (a,)), inner.filter(lambda a: a.op != "const")),
        st.builds(
            lambda name, a, b, swap: Expr(name, (b, a) if swap else (a, b)),
            st.sampled_from(INFIX),
            inner.filter(lambda a: a.op != "const"),
            inner | NUMBERS,
            st.booleans(),
        ),
        st.builds(
            lambda name, a, given_params: Expr(
                name, (a,), tuple(PARAMS.get(name, {}).items()) if given_params else ()
            ),
            st.sampled_from([n for n, o in OPERATORS.items() if o.tensors == 1 and n != "neg"]),
            inner.filter(lambda a: a.op != "const"),
            st.booleans(),
        ),
        st.builds(
            lambda a, b, c: Expr("where", (Expr("gt", (a, const(0))), b, c)),
            inner.filter(lambda a: a.op != "const"),
            inner | NUMBERS,
            inner | NUMBERS,
        ),
    )


EXPRESSIONS = st.recursive(VARIABLES, grow, max_leaves=12)


@BOUNDED
@given(EXPRESSIONS | NUMBERS)
def test_what_is_written_is_read_back(expression):
    text = str(expression)
    assert parse(text) == expression
    assert str(parse(text)) == text  # 1, 1.0 and True compare equal but are written differently


@pytest.mark.parametrize(
    "text",
    [
        "silu(gate) * up",
        "gelu(up, approximate='tanh')",
        "-(up ** 2)",
        "(-up) ** 2",
        "up - (gate - p0)",
        "up / (gate * p0)",
        "(up ** 2) ** gate",
        "up ** (2 ** gate)",
        "(-2) ** up",
        "up * (-1.0)",
        "where(gt(up, 0), up, p0 * expm1(up))",
        "clamp(up, min=0.0, max=None)",
        "threshold(up, threshold=-1e-05, value=0.0)",
        "cast(up, dtype='bfloat16')",
    ],
)
def test_texts_are_kept_as_they_are(text):
    assert str(parse(text)) == text


@BOUNDED
@given(EXPRESSIONS)
def test_value_is_that_of_the_text_in_python(expression):
    """Precedence and parentheses, against Python's own reading of the text with torch functions."""
    values = {name: torch.tensor([0.3, -0.7, 1.9], dtype=torch.float64) for name in ("up", "gate")}
    values.update({name: torch.tensor(0.6, dtype=torch.float64) for name in ("p0", "p1", "p12")})
    scope = {name: known.call for name, known in OPERATORS.items()}
    try:
        expected = eval(
            str(expression), {**scope, **values}
        )  # text made here, not read from outside
    except (TypeError, RuntimeError, OverflowError) as error:
        with pytest.raises(type(error)):
            evaluate(expression, values)
        return
    found = evaluate(parse(str(expression)), values)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def call_of(name):
    """(text, function of the same tensors) that applies one operator, with its parameters."""
    known, params = OPERATORS[name], PARAMS.get(name, {})
    condition = ["gt(up, 0.2)"] if name == "where" else []
    args = [*condition, "up", "gate", "p0"][: known.tensors]
    given_params = [f"{key}={value!r}" for key, value in params.items()]
    text = f"{name}({', '.join([*args, *given_params])})"

    def direct(up, gate, p0):
        tensors = ([up > 0.2] if name == "where" else []) + [up, gate, p0]
        if name == "cast":
            return up.to(torch.float32)
        if name == "prelu":  # F.prelu takes its weight as [1]; here it is the second operand
            return known.call(up, gate)
        return known.call(*tensors[: known.tensors], **params)

    return text, direct


def sample(positive):
    """Values on both sides of every operator's kinks, none on one."""
    up = torch.tensor([[-2.3, -0.45, -0.1, 0.15], [0.28, 0.7, 1.7, 7.0]], dtype=torch.float64)
    gate = torch.tensor([[1.3, -0.2, 0.9, -1.4], [0.37, 0.5, -2.2, 3.0]], dtype=torch.float64)
    return (up.abs(), gate.abs()) if positive else (up, gate)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_the_torch_function_and_its_gradient(name):
    positive = name in ("log", "log1p", "sqrt", "rsqrt", "pow")
    up, gate = sample(positive)
    if name == "prelu":
        gate = torch.tensor([0.3], dtype=torch.float64)
    p0 = torch.tensor(0.8, dtype=torch.float64)
    text, direct = call_of(name)
    values = {"up": up, "gate": gate, "p0": p0}
    used = {key: values[key] for key in sorted(parse(text).variables())}
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in values.items()}
    expected = direct(**leaves)
    torch.testing.assert_close(function(text)(used), expected.detach(), rtol=0, atol=0)

    if not expected.is_floating_point():
        return  # a comparison has no gradient
    upstream = torch.linspace(-1, 2, expected.numel(), dtype=expected.dtype).reshape(expected.shape)
    value, slopes = vjp(text, used, lambda hidden: upstream)
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=0)
    inputs = [leaves[key] for key in used]
    grads = torch.autograd.grad(expected, inputs, upstream, materialize_grads=True)
    assert slopes.keys() == used.keys()
    for key, want in zip(used, grads, strict=True):
        torch.testing.assert_close(slopes[key], want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_gradient_of_a_scalar_is_summed(shape, rows):
    """Traced once at one size, used at all: the gradient of a broadcast scalar has its shape."""
    up = torch.randn(rows, 1 if rows == 1 else 3, dtype=torch.float64)
    p0 = torch.full(shape, 0.3, dtype=torch.float64)
    _, slopes = vjp("p0 * relu(up)", {"up": up, "p0": p0}, torch.ones_like)
    assert slopes["p0"].shape == shape and slopes["up"].shape == up.shape
    torch.testing.assert_close(slopes["p0"].sum(), up.relu().sum())


def test_gradient_works_where_autograd_is_off():
    up = torch.tensor([[1.0, -1.0]])
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            _, slopes = vjp("square(up)", {"up": up}, torch.ones_like)
        assert slopes["up"].tolist() == [[2.0, -2.0]]


def test_a_repeated_part_is_computed_once(monkeypatch):
    calls = []
    known = OPERATORS["exp"]
    spy = type(known)(lambda x: calls.append(1) or torch.exp(x))
    monkeypatch.setitem(OPERATORS, "exp", spy)
    evaluate(parse("exp(up) / (1 + exp(up))"), {"up": torch.ones(2)})
    assert len(calls) == 1


BROKEN = {
    "empty": "",
    "syntax": "up +",
    "statement": "up = 1",
    "unknown variable": "down",
    "capital": "UP",
    "unknown scalar": "p",
    "letters after p": "pi",
    "other digits": "p\N{ARABIC-INDIC DIGIT THREE} * up",
    "unknown call": "eval(up)",
    "import": "__import__('os')",
    "attribute": "up.data",
    "method": "up.exp()",
    "call of a call": "relu(up)(up)",
    "subscript": "up[0]",
    "lambda": "lambda: up",
    "walrus": "(gate := up)",
    "comprehension": "[up for gate in up]",
    "conditional": "up if gate else up",
    "comparison": "up > 0",
    "boolean": "up and gate",
    "tuple": "up, gate",
    "starred": "relu(*up)",
    "double starred": "relu(up, **gate)",
    "await": "await up",
    "format": "f'{up}'",
    "operator": "up @ gate",
    "shift": "up << 2",
    "floor division": "up // 2",
    "unary plus": "+up",
    "inversion": "~up",
    "string": "'up'",
    "bytes": "b'up'",
    "none": "None",
    "ellipsis": "...",
    "complex": "up * 1j",
    "string as a value": "up + 'gate'",
    "no argument": "relu()",
    "too many arguments": "relu(up, gate)",
    "unknown parameter": "relu(up, inplace=True)",
    "repeated parameter": "clamp(up, min=0, min=1)",
    "list as a parameter": "clamp(up, min=[1])",
    "dict as a parameter": "clamp(up, min={})",
    "variable as a parameter": "clamp(up, min=gate)",
    "text as a number": "clamp(up, min='0')",
    "unknown approximation": "gelu(up, approximate='fast')",
    "number as a text": "gelu(up, approximate=1)",
    "dtype that is none": "cast(up, dtype='load')",
    "dunder as a dtype": "cast(up, dtype='__dict__')",
    "infinity": "up * 1e999",
    "negative infinity": "up * -1e999",
    "infinite parameter": "clamp(up, max=1e999)",
    "integer torch cannot take": f"up * {2**63}",
    "null byte": "up\0",
    "surrogate": "up * '\ud800'",
    "lone surrogate": "\ud800",
    "numbers only": "1 + 2",
    "numbers inside": "up * (2 + 3)",
    "negated twice": "up * -(-1)",
    "function of a number": "relu(1.0) * up",
}


@pytest.mark.parametrize("case", BROKEN)
def test_hostile_text_is_refused(case):
    with pytest.raises(ExpressionError):
        parse(BROKEN[case])


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9**9",
        "up * 9**9**9**9",
        "up ** 9 ** 9 ** 9 ** 9",
        "9" * 4000 + " * up",
        "up * " + "9" * 5000,
        "up" + " + up" * 100_000,
        "-" * 4000 + "up",
        "(" * 2000 + "up" + ")" * 2000,
        "relu(" * 500 + "up" + ")" * 500,
        "up" + "+up" * 1300,
        "up**" * 1000 + "up",
        "[" * 4000,
    ],
    ids=lambda text: text[:12],
)
def test_huge_and_deep_texts_are_refused_at_once(text):
    start = time.perf_counter()
    with pytest.raises(ExpressionError):
        parse(text)
    assert time.perf_counter() - start < 2


def test_deepest_text_can_be_read_written_and_run():
    text = "up"
    for _ in range(MAX_DEPTH - 1):
        text = f"relu({text})"
    assert str(parse(text)) == text
    assert function(text)({"up": torch.ones(1)}).item() == 1
    _, slopes = vjp(text, {"up": torch.ones(1, 1)}, torch.ones_like)
    assert slopes["up"].item() == 1
    with pytest.raises(ExpressionError, match="deep"):
        parse(f"relu({text})")
    with pytest.raises(ExpressionError):
        parse("up" + " " * MAX_LENGTH)


def test_shared_parts_cannot_grow_without_bound():
    """x = x * x, thirty times, is a small graph whose text has a billion characters."""
    expression = var("up")
    with pytest.raises(ExpressionError, match="operations"):
        for _ in range(30):
            expression = Expr("mul", (expression, expression))
    assert expression.size <= MAX_SIZE


@pytest.mark.parametrize(
    ("text", "nonlinear", "in_up", "in_gate"),
    [
        ("up", False, False, False),
        ("3.0", False, False, False),
        ("-up + 2 * gate", False, False, False),
        ("up / 3 - gate", False, False, False),
        ("cast(up, dtype='float32')", False, False, False),
        ("p0 * 2", False, False, False),
        ("gelu(up)", True, True, False),
        ("relu(gate) + up", True, False, True),
        ("silu(gate) * up", True, False, True),
        ("gate * sigmoid(gate) * up", True, False, True),
        ("up * gate", True, False, False),  # bilinear: nonlinear, though not in either alone
        ("up * up", True, True, False),
        ("up * (gate * up)", True, True, False),
        ("1 / up", True, True, False),
        ("gate / up", True, True, False),
        ("up / (1 + exp(-gate))", True, False, True),
        ("up ** 2", True, True, False),
        ("where(gt(up, 0), up, 0.01 * up)", True, True, False),
        ("p0 * gate", False, False, False),
        ("tanh(p0) * up", False, False, False),
        ("maximum(up, gate)", True, True, True),
    ],
)
def test_nonlinear(text, nonlinear, in_up, in_gate):
    expression = parse(text)
    assert expression.is_nonlinear() is nonlinear
    assert expression.nonlinear_in("up") is in_up
    assert expression.nonlinear_in("gate") is in_gate


def test_a_variable_that_is_not_read_is_never_nonlinear():
    assert not parse("gelu(gate)").nonlinear_in("up")
    assert parse("gelu(gate) * p3").variables() == {"gate", "p3"}


def test_numbers_keep_their_value():
    for number in (0.1, 1e-300, 5e-324, 1.7976931348623157e308, -0.0, 2**63 - 1):
        (_, value) = parse(f"up * {number!r}").args
        assert value.args[0] == number and type(value.args[0]) is type(number)
        assert math.copysign(1, value.args[0]) == math.copysign(1, number)


def test_quiet_leaves_out_the_noise_of_dropout_and_nothing_else() -> None:
    assert str(quiet(parse("gelu(up) * noise"))) == "gelu(up)"
    assert str(quiet(parse("silu(gate) * noise * up"))) == "silu(gate) * up"
    assert quiet(parse("silu(gate) * up")) == parse("silu(gate) * up")


def test_without_casts_is_the_same_function_of_real_numbers() -> None:
    text = "cast(silu(cast(gate, dtype='float32')), dtype='bfloat16') * up"
    assert str(without_casts(parse(text))) == "silu(gate) * up"
