"""Which modules of a model are projections around attention, and which of them read the same input.

The matcher names the weights and their roles, in a captured call. A projection is a module that can be
replaced where its weight belongs to a linear module, and to nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .capture import unwrap
from .ir import Site
from .passes.block import source
from .probe import Graph, arguments, probing

Source = tuple[int, Any]  # which of the graphs that ran, and a node of it


@dataclass(frozen=True)
class Projection:
    """A projection that a module computes: its site, and the module's path.

    Attributes:
        sources: what it reads in each of its calls; equal for projections of one input.
    """

    site: Site
    path: str
    sources: tuple[Source, ...]


class _Finding:
    """Observer that notes the projections and blocks of a call, and what each of their calls reads."""

    def __init__(self) -> None:
        self.sites: dict[tuple[str, ...], Site] = {}
        self.sources: dict[tuple[str, ...], list[Source]] = {}
        self._graphs = 0

    def run(self, graph: Graph, args: Sequence[Any]) -> Any:
        """Note one graph's sites and run it."""
        self._graphs += 1
        for found in graph.found:
            key = tuple(found.site.params.values())
            self.sites.setdefault(key, found.site)
            self.sources.setdefault(key, []).append((self._graphs, source(found.x)))
        return graph.gm.forward(*args)

    def seen(self, *_: Any) -> None:
        """Nothing is observed."""


def sites_of(
    model: nn.Module, example: Any
) -> tuple[dict[tuple[str, ...], Site], dict[tuple[str, ...], list[Source]]]:
    """The sites of a call by the names of their weights, and what each call of them reads."""
    observer = _Finding()
    args, kwargs = arguments(example)
    with probing(model, observer) as call:
        call(*args, **kwargs)
    return observer.sites, observer.sources


def projections(
    model: nn.Module, example: Any, roles: Collection[str]
) -> tuple[list[Projection], dict[str, str]]:
    """The projections of a call that can be replaced, and {site name: reason} of those that cannot."""
    plain = unwrap(model)
    sites, sources = sites_of(plain, example)
    found: list[Projection] = []
    left: dict[str, str] = {}
    for key, site in sites.items():
        if site.kind != "projection":
            continue
        path = key[0].rpartition(".")[0]
        reason = _unwanted(site, roles) or _fixed(plain, key[0], site)
        if reason is None:
            found.append(Projection(site, path, tuple(sources[key])))
        else:
            left[site.name] = reason
    return found, left


def _unwanted(site: Site, roles: Collection[str]) -> str | None:
    others = [letter for letter in site.role or "" if letter not in roles]
    return f"makes {' and '.join(others)}, which roles leaves out" if others else None


def _fixed(plain: nn.Module, weight: str, site: Site) -> str | None:
    """Why no module can stand in for the one that a weight belongs to, or None if one can."""
    path = weight.rpartition(".")[0]
    owner = plain.get_submodule(path)
    above = plain.get_submodule(path.rpartition(".")[0]) if path else owner
    if isinstance(owner, nn.MultiheadAttention) or isinstance(above, nn.MultiheadAttention):
        return (
            "nn.MultiheadAttention multiplies by this weight inside of one call, so that there is no "
            "module to replace: write the attention with separate linears"
        )
    if not (_is_linear(owner) and weight == f"{path}.weight"):
        return f"belongs to a {type(owner).__name__}; expected nn.Linear, or transformers' Conv1D"
    own = {id(p) for p in owner.parameters()}
    every = plain.named_parameters(remove_duplicate=False)
    tied = [name for name, p in every if id(p) in own and name.rpartition(".")[0] != path]
    if tied:
        return f"shares its weight with {tied[0]}"
    if owner._forward_hooks or owner._forward_pre_hooks:
        return "has forward hooks, which another module would not run"
    return None


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is called with x and returns x W + b, by its class's own forward."""
    conv1d = type(module).__name__ == "Conv1D" and type(module).__module__.startswith(
        "transformers"
    )
    return conv1d or (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )
