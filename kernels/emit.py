"""Source text of what stands between a block's matrices, for kernels that are generated per activation."""

import ast
import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import KernelError
from ..expr import Expr, parse
from ..operators import OPERATORS

_COMPARISONS = ("gt", "ge", "lt", "le")
# torch's arithmetic of two booleans.
_LOGIC = {"mul": "{} & {}", "add": "{} | {}", "minimum": "{} & {}", "maximum": "{} | {}"}
_POWERS = {2: "square", 3: "cube", 4: "fourth", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
# The Triton functions that generated files copy: a file to read, not a module to import.
_LIBRARY = Path(__file__).parent / "gpu" / "math.py"


@dataclass(frozen=True)
class _Language:
    """What differs between languages. Calls and operators do not: their libraries have the same names."""

    name: str  # in messages
    head: str  # of the function called {name}
    line: str  # that defines {name} as {value}, numbers or masks by {kind}
    result: str
    tail: str
    kinds: tuple[str, str]  # of numbers, of masks
    booleans: tuple[str, str]  # False, True
    single: str  # {digits} of an fp32 number
    infinity: str
    nothing: str  # for a parameter that is None

    def number(self, value: Any) -> str:
        """A number as torch rounds it to fp32, in as few digits as give it back; None as no number."""
        if value is None:
            return self.nothing
        single = ctypes.c_float(value).value
        if math.isinf(single):
            return self.infinity if single > 0 else f"-{self.infinity}"
        shortest = (f"{single:.{digits}g}" for digits in range(1, 10))
        text = next(t for t in shortest if ctypes.c_float(float(t)).value == single)
        return self.single.format(digits=text if "." in text or "e" in text else f"{text}.0")


_LANGUAGES = {
    "cpp": _Language(
        name="C++",
        head="static inline vf {name}([[maybe_unused]] vf up, [[maybe_unused]] vf gate, "
        "[[maybe_unused]] const float* p) {{",
        line="const {kind} {name} = {value};",
        result="return {value};",
        tail="}\n",
        kinds=("vf", "vi"),
        booleans=("false", "true"),
        single="{digits}f",
        infinity="HUGE_VALF",
        nothing="nullptr",
    ),
    "triton": _Language(
        name="Triton",
        head="@triton.jit\ndef {name}(up, gate, p):",
        line="{name} = {value}",
        result="return {value}",
        tail="",
        kinds=("", ""),
        booleans=("False", "True"),
        single="{digits}",
        infinity='float("inf")',
        nothing="None",
    ),
}


def activation_source(
    text: str, name: str = "activation", language: Literal["cpp", "triton"] = "cpp"
) -> str:
    """The function that computes an activation text, in "cpp" or "triton".

        static inline vf activation(vf up, vf gate, const float* p)      on vectors of kernels/cpu/vec.h
        def activation(up, gate, p)                                      fp32 tensors, a tuple of scalars

    p[i] is the scalar p<i>; what the text does not read may be anything of its kind, p also (). The
    Triton calls the functions of `library_source`.

    Each distinct part is computed once. Every value stays in fp32: casts to floating dtypes are left
    out, which for half precision is at least as exact as rounding, and fp64 parts are computed in fp32.
    Raises KernelError for what has no spelling: dropout's noise, casts to integers, bool or fp8.
    """
    spoken = _LANGUAGES[language]
    body = _Body(text, spoken)
    result = spoken.result.format(value=body.number(parse(text)))
    lines = "".join(f"    {line}\n" for line in [*body.lines, result])
    return f"{spoken.head.format(name=name)}\n{lines}{spoken.tail}"


def library_source(*texts: str) -> str:
    """The Triton functions that activation texts call, and those that these call, and no others.

    In the order of kernels/gpu/math.py, where they are from. They and the activations need
    `import triton` and `import triton.language as tl` above them.
    """
    known = _library()
    called: set[str] = set()
    fresh = {name for text in texts for name in _calls(activation_source(text, language="triton"))}
    while fresh := (fresh & known.keys()) - called:
        called |= fresh
        fresh = {name for caller in fresh for name in _calls(known[caller])}
    return "\n\n".join(source for name, source in known.items() if name in called)


@lru_cache
def _library() -> dict[str, str]:
    """{name: source} of the functions of kernels/gpu/math.py, in its order."""
    text = _LIBRARY.read_text()
    lines = text.splitlines(keepends=True)
    return {
        node.name: "".join(lines[node.decorator_list[0].lineno - 1 : node.end_lineno])
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }


def _calls(source: str) -> set[str]:
    """Names of the functions that a source text calls, methods and tl's left out."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {called.id for called in calls if isinstance(called, ast.Name)}


class _Body:
    """Straight-line code of an expression: lines that define values, and atoms that name them.

    An atom is a name or a call, so that it can stand beside any operator, and it is numbers or masks (in
    C++ vf or vi), as a torch tensor is of numbers or booleans.
    """

    def __init__(self, text: str, language: _Language) -> None:
        self.lines: list[str] = []
        self._text = text
        self._language = language
        self._known: dict[Expr, tuple[str, bool]] = {}

    def number(self, e: Expr) -> str:
        """The atom of an expression's values as numbers, booleans as 0 and 1."""
        atom, is_mask = self._atom(e)
        return f"number({atom})" if is_mask else atom

    def mask(self, e: Expr) -> str:
        """The atom of an expression's values as masks: where they are not 0."""
        atom, is_mask = self._atom(e)
        return atom if is_mask else f"nonzero({atom})"

    def _atom(self, e: Expr) -> tuple[str, bool]:
        """(atom, whether it is a mask) of an expression; its lines are written when first asked for."""
        if e not in self._known:
            self._known[e] = self._new(e)
        return self._known[e]

    def _new(self, e: Expr) -> tuple[str, bool]:
        match e.op, e.args:
            case "const", (bool(value),):
                return f"mask({self._language.booleans[value]})", True
            case "const", (value,):
                return f"splat({self._language.number(value)})", False
            case "var", ("up" | "gate" as name,):
                return name, False
            case "var", (name,) if name != "noise":
                return self._define(f"splat(p[{name[1:]}])"), False
            case "var", (name,):
                raise self._refusal(name)
            case "cast", (inner,):
                dtype = getattr(torch, str(dict(e.params).get("dtype")), torch.bool)
                if not dtype.is_floating_point or dtype.itemsize < 2:
                    raise self._refusal(f"a cast to {dtype}")
                return self.number(inner), False
        return self._operation(e)

    def _operation(self, e: Expr) -> tuple[str, bool]:
        if e.op == "where":
            chosen, (a, b) = self.mask(e.args[0]), e.args[1:]
            masks = self._atom(a)[1] and self._atom(b)[1]
            read = self.mask if masks else self.number
            return self._define(f"where({chosen}, {read(a)}, {read(b)})", masks), masks
        if e.op in _LOGIC and all(self._atom(arg)[1] for arg in e.args):
            return self._define(_LOGIC[e.op].format(*map(self.mask, e.args)), True), True
        if e.op == "pow" and e.args[1].op == "const" and e.args[1].args[0] in _POWERS:
            power = _POWERS[e.args[1].args[0]]
            return self._define(f"{power}({self.number(e.args[0])})"), False
        comparison = e.op in _COMPARISONS
        return self._define(self._spelling(e), comparison), comparison

    def _spelling(self, e: Expr) -> str:
        """An operator's text, with its operands, and its parameters or their defaults."""
        known = OPERATORS[e.op]
        params = dict(zip(known.params, known.defaults, strict=True)) | dict(e.params)
        texts = {key: value for key, value in params.items() if isinstance(value, str)}
        numbers = [value for value in params.values() if not isinstance(value, str)]
        optional = e.op == "clamp" and any(value is not None for value in numbers)
        if not known.spelling or (None in numbers and not optional):
            raise self._refusal(f"{e.op} with the parameters {params}" if params else e.op)
        operands = [self.number(arg) for arg in e.args]
        spelling = known.spelling.format(*operands, **texts)
        if "{}" in known.spelling:
            return spelling
        return f"{spelling}({', '.join([*operands, *map(self._language.number, numbers)])})"

    def _define(self, value: str, is_mask: bool = False) -> str:
        name = f"t{len(self.lines)}"
        kind = self._language.kinds[is_mask]
        self.lines.append(self._language.line.format(kind=kind, name=name, value=value))
        return name

    def _refusal(self, seen: str) -> KernelError:
        return KernelError(
            f"Activation {self._text!r}: {seen} has no {self._language.name} spelling; "
            "the site then runs by the reference path."
        )
