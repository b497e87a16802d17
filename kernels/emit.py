"""Source text of what stands between a block's matrices, for kernels that are generated per activation."""

import ctypes
import math
from typing import Any

import torch

from ..errors import KernelError
from ..expr import Expr, parse
from ..operators import OPERATORS

_COMPARISONS = ("gt", "ge", "lt", "le")
# torch's arithmetic of two booleans.
_LOGIC = {"mul": "{} & {}", "add": "{} | {}", "minimum": "{} & {}", "maximum": "{} | {}"}
_POWERS = {2: "square", 3: "cube", 4: "fourth", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}


def activation_source(text: str, name: str = "activation") -> str:
    """The C++ function, over vectors of kernels/cpu/vec.h, that computes an activation text.

        static inline vf activation(vf up, vf gate, const float* p)      p[i] is the scalar p<i>

    Each distinct part is computed once. Every value stays in fp32: casts to floating dtypes are left
    out, which for half precision is at least as exact as rounding, and fp64 parts are computed in fp32.
    Raises KernelError for what has no C++ spelling: dropout's noise, casts to integers, bool or fp8.
    """
    body = _Body(text)
    result = body.number(parse(text))
    lines = "".join(f"    {line}\n" for line in [*body.lines, f"return {result};"])
    arguments = ", ".join(f"[[maybe_unused]] {a}" for a in ("vf up", "vf gate", "const float* p"))
    return f"static inline vf {name}({arguments}) {{\n{lines}}}\n"


class _Body:
    """Straight-line C++ of an expression: lines that define values, and atoms that name them.

    An atom is a name or a call, so that it can stand beside any operator, and it is a vector of numbers
    (vf) or of masks (vi), as a torch tensor is of numbers or booleans.
    """

    def __init__(self, text: str) -> None:
        self.lines: list[str] = []
        self._text = text
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
                return f"mask({str(value).lower()})", True
            case "const", (value,):
                return f"splat({_float(value)})", False
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
        """An operator's C++, with its operands, and its parameters or their defaults."""
        known = OPERATORS[e.op]
        params = dict(zip(known.params, known.defaults, strict=True)) | dict(e.params)
        texts = {key: value for key, value in params.items() if isinstance(value, str)}
        numbers = [value for value in params.values() if not isinstance(value, str)]
        optional = e.op == "clamp" and any(value is not None for value in numbers)
        if not known.cpp or (None in numbers and not optional):
            raise self._refusal(f"{e.op} with the parameters {params}" if params else e.op)
        operands = [self.number(arg) for arg in e.args]
        spelling = known.cpp.format(*operands, **texts)
        if "{}" in known.cpp:
            return spelling
        return f"{spelling}({', '.join([*operands, *map(_float, numbers)])})"

    def _define(self, value: str, is_mask: bool = False) -> str:
        name = f"t{len(self.lines)}"
        self.lines.append(f"const {'vi' if is_mask else 'vf'} {name} = {value};")
        return name

    def _refusal(self, seen: str) -> KernelError:
        return KernelError(
            f"Activation {self._text!r}: {seen} has no C++ spelling; "
            "the site then runs by the reference path."
        )


def _float(value: Any) -> str:
    """A number as torch rounds it to fp32, in as few digits as give it back; None as no number."""
    if value is None:
        return "nullptr"
    single = ctypes.c_float(value).value
    if math.isinf(single):
        return "HUGE_VALF" if single > 0 else "-HUGE_VALF"
    shortest = (f"{single:.{digits}g}" for digits in range(1, 10))
    text = next(t for t in shortest if ctypes.c_float(float(t)).value == single)
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"
