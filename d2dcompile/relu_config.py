"""Which fields of a Hugging Face configuration say what a model's activation functions are.

Asked of the family's own code, not of a list of names: the model is built again without memory (on the
meta device) from its configuration with one field changed to ReLU, and what differs is what it governs.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Path = tuple[str, ...]


@dataclass(frozen=True)
class Field:
    """A field of a configuration, or of one inside of it, and what it is and should be.

    Attributes:
        governs: paths of the attributes that it decides, e.g. "model.layers.0.mlp.act_fn".
    """

    path: Path
    before: str
    after: str
    governs: frozenset[str]

    @property
    def name(self) -> str:
        return ".".join(self.path)


def fields(model: nn.Module, keys: Collection[str]) -> list[Field]:
    """The fields that govern attributes of these paths; none for a model without a configuration."""
    config: Any = getattr(model, "config", None)
    if not keys or not hasattr(config, "to_dict") or not hasattr(type(config), "from_dict"):
        return []
    given = config.to_dict()
    plain = _activations(model, given)
    if plain is None:
        return []
    candidates = list(_candidates(given))
    found = [f for one in candidates for f in _governing(model, given, plain, [one], keys)]
    return found or _governing(model, given, plain, candidates, keys)


def set_field(model: nn.Module, field: Field, value: str) -> None:
    """Set a field of the model's configuration."""
    config: Any = model.config
    for part in field.path[:-1]:
        config = getattr(config, part)
    setattr(config, field.path[-1], value)


def _governing(
    model: nn.Module,
    given: Mapping[str, Any],
    plain: Mapping[str, Any],
    changes: Collection[tuple[Path, str, str]],
    keys: Collection[str],
) -> list[Field]:
    """The fields changed together, if that changes any of the keys."""
    changed = copy.deepcopy(dict(given))
    for path, _, after in changes:
        inner = changed
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = after
    built = _activations(model, changed) or {}
    governs = frozenset(key for key in plain if key in built and built[key] != plain[key])
    return [Field(*change, governs) for change in changes] if governs & set(keys) else []


def _candidates(given: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, str, str]]:
    """Fields whose value names an activation function, also as the last part of "gated-gelu"."""
    from transformers.activations import ACT2FN

    for name, value in given.items():
        if isinstance(value, Mapping):
            yield from _candidates(value, (*path, name))
        elif isinstance(value, str) and value.rpartition("-")[2] in ACT2FN:
            first, dash, _ = value.rpartition("-")
            yield (*path, name), value, f"{first}{dash}relu"


def _activations(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """What tells the functions at the attributes of a freshly built model apart; None if none is built."""
    try:
        config = type(model.config).from_dict(copy.deepcopy(dict(given)))  # type: ignore[union-attr]
        with torch.device("meta"):
            fresh = type(model)(config)
    except Exception:  # a family's own code, with a value that it may not know
        return None
    found: dict[str, Any] = {}
    for path, module in fresh.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(module).items():
            if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
                found[prefix + name] = value
        for name, child in module.named_children():
            if is_atom(child):
                found[prefix + name] = repr(child)
    return found


def is_atom(module: nn.Module) -> bool:
    """Whether a module has neither parts nor parameters, as activation functions do."""
    return next(module.children(), None) is None and next(module.parameters(), None) is None
