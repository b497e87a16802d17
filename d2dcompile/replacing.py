"""Where a model holds the activation function of a site: an attribute, found by what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SparsifyError
from .expr import evaluate
from .locating import Seen, gate_part
from .passes.block import common_path
from .relu_config import is_atom

Function = Callable[[Tensor], Tensor]
_GRID = torch.linspace(-8, 8, 257)


class Annealed(nn.Module):
    """(1 - amount) act(x) + amount relu(x); `amount` is a buffer that is not saved."""

    amount: Tensor

    def __init__(self, act: Function, device: torch.device) -> None:
        super().__init__()
        self.act = act
        self.register_buffer("amount", torch.zeros((), device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The mix of a tensor of any shape."""
        mixed: Tensor = (1 - self.amount) * self.act(x) + self.amount * torch.relu(x)
        return mixed


@dataclass(frozen=True)
class Place:
    """The attribute of a module that holds an activation function, and what it held."""

    owner: nn.Module
    path: str
    name: str
    original: Function
    flag: int | None = None  # what nn.TransformerEncoderLayer's fused path takes the activation for

    @property
    def key(self) -> str:
        """The attribute's path from the model."""
        return f"{self.path}.{self.name}".removeprefix(".")

    def put(self, value: Function, flag: int | None = 0) -> None:
        """Let the attribute hold another function."""
        if not isinstance(value, nn.Module) and self.name in self.owner._modules:
            delattr(self.owner, self.name)
        setattr(self.owner, self.name, value)
        if self.flag is not None:
            self.owner.activation_relu_or_gelu = flag  # type: ignore[assignment]

    def finish(self) -> None:
        """Let the attribute hold ReLU: a module where there was one, else a function."""
        self.put(nn.ReLU() if isinstance(self.original, nn.Module) else nn.functional.relu, flag=1)

    def restore(self) -> None:
        """Let the attribute hold what it held."""
        self.put(self.original, self.flag)


def unreachable(seen: Seen, why: str) -> SparsifyError:
    return SparsifyError(
        f"Site {seen.line}: cannot replace {gate_part(seen.site)}: {why}; expected its activation to "
        "be an attribute, module or function, of a module around its first projection. Make it one, "
        "such as self.act = torch.nn.GELU()."
    )


def _values(seen: Seen) -> Tensor | None:
    """The site's activation on the grid, or None where it has scalars of its own."""
    part = gate_part(seen.site)
    own = part.variables() != part.neurons()
    return None if own else evaluate(part, dict.fromkeys(part.neurons(), _GRID))


def is_sparse(seen: Seen) -> bool:
    """Whether the activation is zero below zero."""
    values = _values(seen)
    return values is not None and not values[_GRID < 0].any()


def place_of(plain: nn.Module, seen: Seen) -> Place:
    """The attribute that holds a site's activation function. Raises SparsifyError if none does."""
    site, values = seen.site, _values(seen)
    if values is None:
        raise unreachable(seen, "it has a scalar of its own")
    role = next(iter(site.params))
    path = site.params[role].rpartition(".")[0]
    top = common_path(list(site.params.values()))
    while path != top:
        path = path.rpartition(".")[0]
        owner = plain.get_submodule(path)
        same = [name for name, act in _callables(owner) if _computes(act, values)]
        if len(same) > 1:
            raise unreachable(
                seen, f"{' and '.join(same)} of {path or 'the model'} compute the same"
            )
        if same:
            flag = getattr(owner, "activation_relu_or_gelu", None)
            return Place(owner, path, same[0], getattr(owner, same[0]), flag)
    raise unreachable(seen, "no attribute computes the same")


def _callables(owner: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes that may be activation functions: modules without parts, and functions."""
    for name, child in owner._modules.items():
        if child is not None and is_atom(child):
            yield name, child
    for name, value in vars(owner).items():
        if callable(value) and not isinstance(value, type) and name != "forward":
            yield name, value


def _computes(act: Any, values: Tensor) -> bool:
    try:
        with torch.no_grad():
            result = act(_GRID.clone())
    except Exception:  # it is not known what is called; what fails is no activation function
        return False
    same = isinstance(result, Tensor) and result.shape == values.shape
    return same and torch.allclose(result, values, rtol=1e-4, atol=1e-5)


def place_at(plain: nn.Module, key: str) -> Place | None:
    """The place of a path, unless the model has none there or ReLU is there already."""
    path, _, name = key.rpartition(".")
    owner = plain.get_submodule(path)
    held = getattr(owner, name, None)
    if not callable(held) or _computes(held, torch.relu(_GRID)):
        return None
    return Place(owner, path, name, held, getattr(owner, "activation_relu_or_gelu", None))
