"""Elementwise expressions: the text of what stands between a block's matrices, e.g. "silu(gate) * up".

One table of operators serves three readers: the matcher writes text from graph nodes, the reference
ops evaluate it with torch, and code generators spell it in their language. The text is a small subset
of Python (names, numbers, + - * / **, calls of known operators), parsed and checked, never executed.
"""

import ast
import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .errors import ExpressionError
from .operators import OPERATORS

MAX_LENGTH = 4096  # characters; the longest activation seen (xIELU) takes about 300
MAX_SIZE = 4096  # nodes, shared ones counted each time: no text of MAX_LENGTH spells more
MAX_DEPTH = 64  # nested nodes, so that no reader recurses past Python's limit of 1000 frames
VARIABLES = ("up", "gate", "noise")  # noise: what active dropout multiplies by


_INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2), "pow": ("**", 4)}
_TEXTS = {  # parameters that are texts, and what they may be
    "approximate": ("none", "tanh"),
    "dtype": tuple(name for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
_BINARY = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.Pow: "pow"}


@dataclass(frozen=True)
class Expr:
    """A node of an expression: an operator over arguments, a variable, or a number.

    `op` is a key of OPERATORS, "var" (args = (name,)) or "const" (args = (number,), see `const`).
    """

    op: str
    args: tuple[Any, ...] = ()
    params: tuple[tuple[str, Any], ...] = ()
    size: int = field(init=False, compare=False, repr=False)
    depth: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        inner = [arg for arg in self.args if isinstance(arg, Expr)]
        object.__setattr__(self, "size", 1 + sum(arg.size for arg in inner))
        object.__setattr__(self, "depth", 1 + max((arg.depth for arg in inner), default=0))
        if self.size > MAX_SIZE or self.depth > MAX_DEPTH:
            raise ExpressionError(
                f"An activation has {self.size} operations, {self.depth} deep; expected at most "
                f"{MAX_SIZE} and {MAX_DEPTH}."
            )

    def variables(self) -> set[str]:
        """Names of the variables it reads."""
        if self.op == "var":
            return {self.args[0]}
        if self.op == "const":
            return set()
        return set().union(*(arg.variables() for arg in self.args))

    def neurons(self) -> set[str]:
        """Names of the variables that are values of neurons, not scalars or dropout's noise."""
        return {name for name in self.variables() if name != "noise" and name[0] != "p"}

    def is_nonlinear(self) -> bool:
        """Whether it is a nonlinear function of its neurons' values."""
        if self.op in ("var", "const") or not self.neurons():
            return False
        dependent = [arg for arg in self.args if arg.neurons()]
        if any(arg.is_nonlinear() for arg in dependent) or OPERATORS[self.op].nonlinear:
            return True
        if self.op == "mul":
            return len(dependent) == 2
        return self.op == "div" and bool(self.args[1].neurons())

    def nonlinear_in(self, name: str) -> bool:
        """Whether `name` passes through a nonlinear operator, products with others not counted."""
        if self.op in ("var", "const") or name not in self.variables():
            return False
        if OPERATORS[self.op].nonlinear:
            return True
        if self.op == "div" and name in self.args[1].variables():
            return True
        inside = [arg for arg in self.args if name in arg.variables()]
        return (len(inside) > 1 and self.op == "mul") or any(a.nonlinear_in(name) for a in inside)

    def __str__(self) -> str:
        return self._text(0)

    def _text(self, level: int) -> str:
        if self.op == "var":
            return str(self.args[0])
        if self.op == "const":
            text = repr(self.args[0])
            return f"({text})" if text.startswith("-") and level else text
        if self.op == "neg":
            return f"(-{self.args[0]._text(3)})" if level else f"-{self.args[0]._text(3)}"
        if self.op in _INFIX:
            sign, mine = _INFIX[self.op]
            left, right = (
                arg._text(mine + extra) for arg, extra in zip(self.args, (0, 1), strict=True)
            )
            text = f"{left} {sign} {right}"
            return f"({text})" if level > mine or (self.op == "pow" and level) else text
        parts = [arg._text(0) for arg in self.args]
        parts += [f"{name}={value!r}" for name, value in self.params]
        return f"{self.op}({', '.join(parts)})"


def var(name: str) -> Expr:
    """The expression that is the variable `name`."""
    return Expr("var", (name,))


def const(value: float | bool) -> Expr:
    """The expression that is a number; 1, 1.0 and True, or 0.0 and -0.0, are different expressions."""
    return Expr("const", (value,), (("spelt", repr(value)),))


def quiet(expression: Expr) -> Expr:
    """The expression without dropout's noise: what it is in eval mode."""
    if expression.op in ("var", "const"):
        return expression
    if expression.op == "mul" and expression.args[1] == var("noise"):
        return quiet(expression.args[0])
    return Expr(expression.op, tuple(map(quiet, expression.args)), expression.params)


def without_casts(expression: Expr) -> Expr:
    """The expression without changes of dtype: the same function of real numbers."""
    if expression.op in ("var", "const"):
        return expression
    if expression.op == "cast":
        return without_casts(expression.args[0])
    return Expr(expression.op, tuple(map(without_casts, expression.args)), expression.params)


@lru_cache(maxsize=1024)
def parse(text: str) -> Expr:
    """The expression that `text` spells; `str` of it gives the text back.

    Raises ExpressionError for anything but names, numbers, + - * / ** and known operators.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(
            f"Activation text of {len(text)} characters; expected <= {MAX_LENGTH}."
        )
    try:
        tree = ast.parse(text, mode="eval")
        return _build(tree.body, text)
    except ExpressionError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ExpressionError(f"Activation {text!r} is not an expression.") from None


def _build(node: ast.expr, text: str) -> Expr:
    match node:
        case ast.Name(id=name) if name in VARIABLES or re.fullmatch(r"p[0-9]+", name):
            return var(name)
        case ast.Constant() | ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
            value = _literal(node)
            if isinstance(value, (bool, int, float)):
                return const(value)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _apply(_BINARY[type(op)], (left, right), (), text)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _apply("neg", (operand,), (), text)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=given) if name in OPERATORS:
            known = OPERATORS[name]
            params = tuple((str(k.arg), _literal(k.value)) for k in given)
            fits = all(key in known.params and _param(key, value) for key, value in params)
            if len(args) == known.tensors and fits and len(dict(params)) == len(params):
                return _apply(name, tuple(args), params, text)
    raise ExpressionError(
        f"Activation {text!r}: {ast.unparse(node)!r} is not a known variable, number or operator; "
        f"operators: {', '.join(sorted(OPERATORS))}."
    )


def _apply(
    name: str, args: tuple[ast.expr, ...], params: tuple[tuple[str, Any], ...], text: str
) -> Expr:
    """The operator over built arguments; numbers alone are refused, since 9 ** 9 ** 9 never ends."""
    built = tuple(_build(arg, text) for arg in args)
    if all(arg.op == "const" for arg in built):
        raise ExpressionError(f"Activation {text!r}: {name} of numbers only; expected a variable.")
    return Expr(name, built, params)


def _literal(node: ast.expr) -> Any:
    """The value of a literal: a text, None, or a number that torch can take; else `...`."""
    match node:
        case ast.Constant(value=str() | None as text):
            return text
        case ast.Constant(value=bool() | int() | float() as number):
            value: float = number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            value = -number
        case _:
            return ...
    finite = math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 63
    return value if finite else ...


def _param(key: str, value: Any) -> bool:
    """Whether an operator's parameter has a possible value."""
    if key in _TEXTS:
        return value in _TEXTS[key]
    return value is None or isinstance(value, (bool, int, float))


def evaluate(expression: Expr, values: Mapping[str, Tensor]) -> Tensor:
    """The value of the expression, elementwise in torch, in the dtypes of the given variables.

    values: {variable: tensor}, broadcastable shapes. Each distinct subexpression is computed once.
    """
    memo: dict[Expr, Any] = {}

    def value(e: Expr) -> Any:
        if e.op == "var":
            return values[e.args[0]]
        if e.op == "const":
            return e.args[0]
        if e not in memo:
            memo[e] = OPERATORS[e.op].call(*(value(arg) for arg in e.args), **dict(e.params))
        return memo[e]

    result: Tensor = value(expression)
    return result


@lru_cache(maxsize=256)
def function(text: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The torch function of an activation text, from {variable: tensor} to a tensor; cached."""
    expression = parse(text)
    return lambda values: evaluate(expression, values)


def vjp(
    text: str, values: Mapping[str, Tensor], upstream: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The activation's value and, given the gradient of that value, the gradient of each variable.

    values: {variable: tensor}; upstream(value) returns the gradient of the value, same shape.
    The gradient is traced once per text and dtypes into explicit tensor code, because autograd is
    switched off where custom ops run.
    """
    names = tuple(sorted(values))
    operands = [values[name] for name in names]
    hidden = function(text)(values)
    key = tuple((v.dtype, v.dim(), v.device) for v in operands)
    slopes = _slopes(text, names, key)(*operands, upstream(hidden))
    return hidden, dict(zip(names, slopes, strict=True))


@lru_cache(maxsize=256)
def _slopes(
    text: str, names: tuple[str, ...], key: tuple[tuple[torch.dtype, int, torch.device], ...]
) -> Any:
    """Explicit tensor code for (*variables, grad of value) -> grads of the variables.

    Traced in a thread of its own: dispatch state and modes of a running op are per thread.
    """

    def gradient(*args: Tensor) -> tuple[Tensor, ...]:
        *operands, grad = args

        def forward(*variables: Tensor) -> Tensor:
            return function(text)(dict(zip(names, variables, strict=True)))

        pull = torch.func.vjp(forward, *operands)[1]
        result: tuple[Tensor, ...] = pull(grad)
        return result

    def trace() -> Any:
        shapes = {2: (3, 5), 1: (1,), 0: ()}
        samples = [
            torch.full(shapes[dim], 0.5, dtype=dtype, device=device) for dtype, dim, device in key
        ]
        value = function(text)(dict(zip(names, samples, strict=True)))
        return make_fx(gradient, tracing_mode="symbolic")(*samples, torch.ones_like(value))

    with ThreadPoolExecutor(max_workers=1) as worker:
        return worker.submit(trace).result()
