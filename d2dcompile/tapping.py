"""Where an eager model computes a site's hidden activation: a `Tap`, the input or output of a module.

The matcher names a site's parameters; the modules that own them are called with its values. Whether
they really are is checked: the captured graph and the eager model run on the same example, and what each
tap sees must be what the graph computes there.

    at              plain act(up)                           gated act(gate) * up
    activation      input of down; with dropout before      act of the output of gate
                    down, act of the output of up
    hidden          input of down                           input of down
    preactivation   output of up                            output of gate
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .capture import unwrap
from .errors import SparsifyError
from .expr import Expr, function, var, vjp
from .ir import Site
from .locating import Print, Seen, gate_part, locate, print_of
from .passes.inplace import changed_by
from .passes.names import argument, op_name
from .probe import arguments

PLACES = ("activation", "hidden", "preactivation")


@dataclass(frozen=True)
class Tap:
    """How to read a site's activation, and to put a gradient there.

    Attributes:
        site: the site.
        module, side: whose first input ("input") or output ("output") is tapped.
        axis: the feature axis of that tensor, counted from the end.
        half: for the output of a fused gate and up, which half, 0 or 1; interleaved: in turns.
        text: the activation as a function of that tensor, over `variable`; "" where it is the tensor.
        penalised: whether the penalty is of the activation, not of the tensor before it.
        scalars: {variable: (module, buffer)} that the text reads, such as how far annealing is.
        calls: how often one forward pass runs the site.
        copied: whether the tensor is changed in place afterwards.
    """

    site: Site
    module: nn.Module = field(repr=False)
    side: str
    axis: int
    half: int | None = None
    text: str = ""
    variable: str = ""
    penalised: bool = True
    scalars: Mapping[str, tuple[nn.Module, str]] = field(default_factory=dict)
    calls: int = 1
    copied: bool = False

    def rows(self, values: Tensor) -> Tensor:
        """The values of the site's neurons, [tokens, H], as a view or a copy of the tapped tensor."""
        return self._part(values.movedim(self.axis, -1)).flatten(0, -2)

    def activation(self, rows: Tensor) -> Tensor:
        """The activation of rows [tokens, H]."""
        return function(self.text)(self._variables(rows)) if self.text else rows

    def slope(self, values: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient of the tapped tensor, given that of what is penalised as a function of it."""
        rows = self.rows(values)
        if self.text and self.penalised:
            slopes = vjp(self.text, self._variables(rows), lambda a: gradient(a).to(a.dtype))[1]
            found = slopes[self.variable]
        else:
            found = gradient(rows)
        full = torch.zeros_like(values) if self.half is not None else torch.empty_like(values)
        moved = full.movedim(self.axis, -1)
        part = self._part(moved)
        part.copy_(found.reshape(part.shape))
        return full

    def _part(self, features_last: Tensor) -> Tensor:
        if self.half is None:
            return features_last
        if self.site.interleaved:
            return features_last[..., self.half :: 2]
        return features_last.chunk(2, -1)[self.half]

    def _variables(self, rows: Tensor) -> dict[str, Tensor]:
        scalars = {name: getattr(owner, key) for name, (owner, key) in self.scalars.items()}
        return {self.variable: rows, **scalars}


def taps(model: nn.Module, example: Any, at: str, factors: Mapping[str, float]) -> list[Tap]:
    """A checked tap at each site that a call of the model runs, in execution order.

    example: what the model is called with. at: one of PLACES. factors: by site name; sites with
    factor 0 get no tap. Runs the example twice, in eval mode without gradients.

    Raises SparsifyError for names of no site, and, naming the site, where the activation is not a
    module's input or output.
    """
    plain, located = unwrap(model), locate(model, example)
    known = [seen.site.name for seen in located]
    unknown = sorted(set(factors) - set(known))
    if unknown:
        raise SparsifyError(f"No site {unknown[0]!r}; expected some of {', '.join(known)}.")
    wanted = [seen for seen in located if factors.get(seen.site.name, 1) != 0]
    found = [_tap(plain, seen, at) for seen in wanted]
    checked = []
    for tap, seen, eager in zip(found, wanted, _eager(plain, found, example), strict=True):
        graph = seen.prints[_role(tap)]
        if len(eager) != len(graph) or not all(map(Print.like, eager, graph)):
            raise SparsifyError(
                f"Site {seen.line}: the {tap.side} of the module that owns "
                f"{tap.site.params[_role(tap)]} is not what the graph computes there ({len(eager)} "
                f"calls of the module, {len(graph)} of the site); expected a module that is called for "
                f"its product. Leave the site out with sites={{{tap.site.name!r}: 0}}."
            )
        checked.append(replace(tap, calls=len(eager)))
    return checked


def _role(tap: Tap) -> str:
    first = next(role for role in ("gate", "gate_up", "up") if role in tap.site.params)
    return "down" if tap.side == "input" else first


def _tap(plain: nn.Module, seen: Seen, at: str) -> Tap:
    site = seen.site
    dropout = any(
        op_name(n) == "dropout" and argument(n, 1, "p", 0.5) != 0 for n in seen.match.inside
    )
    if at == "hidden" and dropout:
        raise SparsifyError(
            f"Site {seen.line} has dropout before its down projection, whose "
            "zeros would count as sparsity; expected none. Penalise at='activation', or set it to 0."
        )
    into_down = at == "hidden" or (at == "activation" and site.kind == "ffn" and not dropout)
    role = "down" if into_down else next(iter(site.params))
    module = _owner(plain, site, role)
    linear = seen.match.linears[list(site.params).index(role)]
    if linear.axis is None:
        raise SparsifyError(f"Site {site.name!r} has no single feature axis; expected one.")
    if into_down:
        return Tap(site, module, "input", linear.axis)
    variable = "gate" if site.kind == "glu" else "up"
    part = gate_part(site)
    return Tap(
        site,
        module,
        "output",
        linear.axis,
        half=site.halves.index("gate") if site.halves else None,
        text="" if part == var(variable) else str(part),
        variable=variable,
        penalised=at == "activation",
        scalars=_live(plain, seen, part),
        copied=any(changed_by(node) is not None for node in seen.match.inside),
    )


def _owner(plain: nn.Module, site: Site, role: str) -> nn.Module:
    """The module that owns a site's weight."""
    try:
        return plain.get_submodule(site.params[role].rpartition(".")[0])
    except AttributeError:
        raise SparsifyError(
            f"Site {site.name!r}: {site.params[role]} belongs to no module of the model; expected a "
            "module of its own for each projection."
        ) from None


def _live(plain: nn.Module, seen: Seen, part: Expr) -> dict[str, tuple[nn.Module, str]]:
    """Where the scalars that an activation reads live: in buffers, which may move but not learn."""
    buffers = {
        id(value): (module, key)
        for module in plain.modules()
        for key, value in module._buffers.items()
    }
    names = sorted(part.variables() - part.neurons() - {"noise"})
    unknown = [name for name in names if id(seen.scalars.get(name)) not in buffers]
    if unknown:
        site = seen.site
        raise SparsifyError(
            f"Site {seen.line} has an activation with a learnable scalar, "
            f"{part}; expected none. Penalise at='hidden' or leave it out with "
            f"sites={{{site.name!r}: 0}}."
        )
    return {name: buffers[id(seen.scalars[name])] for name in names}


def _eager(plain: nn.Module, found: Sequence[Tap], example: Any) -> list[list[Print]]:
    """Prints of what each tap sees when the eager model runs the example."""
    prints: list[list[Print]] = [[] for _ in found]
    args, kwargs = arguments(example)
    modes = [(module, module.training) for module in plain.modules()]
    handles = [tap_hook(tap, _recorder(kept)) for tap, kept in zip(found, prints, strict=True)]
    devices = range(torch.cuda.device_count())
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            plain.eval()(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return prints


def _recorder(kept: list[Print]) -> Callable[[Tensor], Tensor]:
    def record(values: Tensor) -> Tensor:
        kept.append(print_of(values))
        return values

    return record


def tap_hook(tap: Tap, replace: Callable[[Tensor], Tensor]) -> Any:
    """A forward hook that puts `replace(values)` in the place of what a tap sees; its handle."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (replace(args[0]), *args[1:]) if args else args

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return replace(output) if isinstance(output, Tensor) else output

    if tap.side == "input":
        return tap.module.register_forward_pre_hook(before)
    return tap.module.register_forward_hook(after)
