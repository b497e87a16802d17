"""Op: a meaning in plain PyTorch, registered as a custom op, and the implementations that serve it.

The meaning is reference, fallback and specification in one. Implementations answer two separate
questions, "here?" (platform) and "these arguments?" (accepts); which one is preferred is a third, and
`D2D_IMPL=op:name` answers it for the user. Op names carry a version, raised with every change of
schema, fake or gradient, because compiled-graph caches are keyed by the name alone.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ..errors import KernelError

_OPS: dict[str, "Op"] = {}  # all ops by name, so that a misspelt one in D2D_IMPL is an error


@dataclass(frozen=True)
class Implementation:
    """One way to run an op: its name, where it can run, which arguments it takes, and the run.

    on_request: whether it runs only where D2D_IMPL names it.
    """

    name: str
    platform: Callable[[], bool]
    accepts: Callable[..., bool]
    run: Callable[..., Any]
    on_request: bool = False


class Op:
    """A custom op `d2d::<name>_v<version>` made from its meaning.

    Calling it calls the registered op, so it can be traced, compiled, exported and differentiated.
    """

    def __init__(self, meaning: Callable[..., Any], version: int) -> None:
        self.name = meaning.__name__
        self.meaning = meaning
        self.__doc__ = meaning.__doc__
        self._parameters = inspect.signature(meaning).parameters
        self._implementations: list[Implementation] = []
        qualified = f"d2d::{self.name}_v{version}"
        schema = torch.library.infer_schema(meaning, mutates_args=())
        self.custom = torch.library.custom_op(qualified, self._run, mutates_args=(), schema=schema)
        self.packet: Any = getattr(torch.ops.d2d, f"{self.name}_v{version}")
        self.overload: Any = self.packet.default
        _OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def fake(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Register the rule from fake inputs to outputs of the right shape, dtype and device."""
        self.custom.register_fake(rule)
        return rule

    def autograd(self, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
        """Register the gradient, explicit tensor code or another op (see torch.library)."""
        self.custom.register_autograd(backward, setup_context=setup)

    def flops(self, formula: Callable[..., int]) -> Callable[..., int]:
        """Register how many FLOPs a call takes; the formula sees the real arguments."""
        register_flop_formula([self.packet], get_raw=True)(formula)
        return formula

    def impl(
        self,
        name: str,
        run: Callable[..., Any],
        *,
        platform: Callable[[], bool] = lambda: True,
        accepts: Callable[..., bool] = lambda *_: True,
        on_request: bool = False,
    ) -> None:
        """Add an implementation; it must take the same parameters as the meaning.

        on_request: whether it runs only where D2D_IMPL names it.
        """
        if name in self.names():
            raise KernelError(
                f"{self.name} has an implementation {name!r} already; take another name."
            )
        if list(inspect.signature(run).parameters) != list(self._parameters):
            raise KernelError(
                f"{self.name}:{name} takes {inspect.signature(run)}; the op takes "
                f"({', '.join(self._parameters)}). Give both the same parameters."
            )
        self._implementations.append(Implementation(name, platform, accepts, run, on_request))

    def names(self) -> Sequence[str]:
        """Names of the implementations, in order of preference; "reference" is always the last."""
        return [*(known.name for known in self._implementations), "reference"]

    def _run(self, *args: Any) -> Any:
        wanted = requested().get(self.name)
        if wanted == "reference":
            return self.meaning(*args)
        for known in self._implementations:
            asked = wanted == known.name or (wanted is None and not known.on_request)
            if asked and known.platform() and known.accepts(*args):
                return known.run(*args)
        if wanted is not None:
            raise KernelError(f"{self.name}:{wanted} does not run here or refuses these arguments.")
        return self.meaning(*args)


def op(version: int) -> Callable[[Callable[..., Any]], Op]:
    """Decorator that makes an `Op` of a function whose body is its meaning."""
    return lambda meaning: Op(meaning, version)


def requested() -> dict[str, str]:
    """{op: implementation} that D2D_IMPL asks for; KernelError for unknown ones and what is no such list."""
    wanted = _parse_wanted(os.environ.get("D2D_IMPL", ""))
    if not wanted.keys() <= _OPS.keys():
        unknown = ", ".join(sorted(wanted.keys() - _OPS.keys()))
        raise KernelError(
            f"D2D_IMPL names unknown ops: {unknown}; known: {', '.join(sorted(_OPS))}."
        )
    for name, implementation in wanted.items():
        if implementation not in _OPS[name].names():
            known = ", ".join(_OPS[name].names())
            raise KernelError(f"D2D_IMPL asks for {name}:{implementation}; known: {known}.")
    return wanted


@lru_cache(maxsize=8)
def _parse_wanted(text: str) -> dict[str, str]:
    """The D2D_IMPL variable, "op:name,op:name", as a mapping."""
    pairs = [part.split(":") for part in text.split(",") if part]
    if any(len(pair) != 2 for pair in pairs):
        raise KernelError(f"D2D_IMPL is {text!r}; expected op:name pairs, such as gate:reference.")
    return dict(pairs)
