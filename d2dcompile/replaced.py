"""Replaced: a model with blocks in the place of projections, and the way back; saved and loaded.

`projections.json` lists paths and sizes, `projections.safetensors` holds the blocks' parameters; no pickle.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .artifact import digest_of, entry, write_pair
from .capture import unwrap
from .distilling import Fitted, ProjectionMLP
from .errors import ArtifactError, ProjectionError
from .reading import inside, read_json, read_tensors

FORMAT, VERSION = "d2dmoe-projections", 1
JSON_NAME, TENSORS_NAME = "projections.json", "projections.safetensors"
KEYS = {"format", "version", "sites", "left", "tensors", "sha256"}
PARAMETERS = ("up.weight", "up.bias", "down.weight", "down.bias")


@dataclass(frozen=True)
class Replacement:
    """One replaced projection.

    Attributes:
        name, role: of its site; path: of the module that was replaced.
        d_model, d_out, hidden: features of input and output, and hidden neurons of the block.
        figures: error on held-out rows, that of a linear bottleneck of the same cost, active share.
        parameters, dense_parameters, macs, dense_macs: of the block and of the layer; per token.
        original, block: the layer, and what stands there now.
    """

    name: str
    path: str
    role: str
    d_model: int
    d_out: int
    hidden: int
    figures: Fitted
    parameters: int
    dense_parameters: int
    macs: int
    dense_macs: int
    original: nn.Module = field(repr=False, compare=False)
    block: ProjectionMLP = field(repr=False, compare=False)


class Replaced:
    """A model whose projections are blocks. Made by `replace_projections` and `load_projections`.

    Attributes:
        sites: what was replaced, in execution order.
        left: {site name: reason} of the projections that stayed.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Replacement], left: Mapping[str, str]
    ) -> None:
        self.sites, self.left = tuple(sites), dict(left)
        self._model = weakref.ref(model)
        for one in sites:
            put(model, one.path, one.block)

    def __str__(self) -> str:
        lines = [
            f"{'site':<44} {'role':<4} {'D':>6} {'out':>6} {'H':>6} {'error':>7} {'linear':>7} {'active':>7} "
            f"{'macs':>7}"
        ]
        for one in self.sites:
            f = one.figures
            lines.append(
                f"{one.name:<44} {one.role:<4} {one.d_model:>6} {one.d_out:>6} {one.hidden:>6} "
                f"{f.error:>7.2%} {f.linear_error:>7.2%} {f.active:>7.1%} "
                f"{one.macs / one.dense_macs:>7.1%}"
            )
        return "\n".join([*lines, *(f"{name}: {why}" for name, why in self.left.items())])

    def undo(self) -> None:
        """Put the original layers back, the very modules with their values; a second call does nothing.

        Raises ProjectionError, with nothing changed, if the model is gone or holds another module at a place.
        """
        model = self._alive()
        held = [model.get_submodule(one.path) for one in self.sites]
        if all(module is one.original for module, one in zip(held, self.sites, strict=True)):
            return
        for module, one in zip(held, self.sites, strict=True):
            if module is not one.block:
                raise ProjectionError(
                    f"{one.path} is a {type(module).__name__} that was put there since; expected the block "
                    f"that was made for it. Undo what replaced it first."
                )
        for one in self.sites:
            put(model, one.path, one.original.train(one.block.training))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the blocks as they are now, also after fine-tuning or conversion, for `load_projections`.

        Files of an earlier `save` in the folder are replaced, both at once or neither.
        """
        tensors = {
            f"{one.path}.{name}": p.detach().cpu().contiguous().clone()
            for one in self.sites
            for name, p in one.block.named_parameters()
        }
        document: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "sites": [_json(one) for one in self.sites],
            "left": self.left,
            "tensors": {name: entry(tensor) for name, tensor in sorted(tensors.items())},
        }
        write_pair(folder, document, tensors, JSON_NAME, TENSORS_NAME)

    def _alive(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ProjectionError("The model whose projections were replaced exists no more.")
        return model


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Let a module path hold another module."""
    above, _, name = path.rpartition(".")
    setattr(model.get_submodule(above), name, module)


def _json(one: Replacement) -> dict[str, Any]:
    kept = ("name", "path", "role", "d_model", "d_out", "hidden", "dense_parameters")
    return {
        **{key: getattr(one, key) for key in kept},
        "residual": one.block.residual,
        "figures": asdict(one.figures),
    }


def load_projections(model: nn.Module, folder: str | os.PathLike[str]) -> Replaced:
    """Put the blocks that `Replaced.save` wrote into a model of the same architecture, in place.

    The model may be the original one, or one freshly built from its configuration whose weights are loaded
    afterwards: the blocks' parameters are called `<path>.up.weight` and so on in its state_dict. Blocks get
    the device and dtype of the layers that they replace. Call it before loading a conversion.

    Raises ArtifactError for damaged or foreign files, and ProjectionError where the model has no linear layer
    of that size at a path; the model is then as before.
    """
    plain = unwrap(model)
    document = read_json(inside(Path(folder), JSON_NAME))
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        raise ArtifactError(
            f"{JSON_NAME} is {document.get('format')!r} version {document.get('version')!r}; expected "
            f"{FORMAT!r} version {VERSION}."
        )
    if set(document) != KEYS or document["sha256"] != digest_of(document):
        raise ArtifactError(
            f"{JSON_NAME} does not have the content that its sha256 was made of: damaged or edited. Copy it "
            "again."
        )
    tensors = read_tensors(inside(Path(folder), TENSORS_NAME), document["tensors"])
    try:
        made = [_loaded(plain, item, tensors) for item in document["sites"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, (ArtifactError, ProjectionError)):
            raise
        raise ArtifactError(f"{JSON_NAME}: a site is not as saved: {error!r}.") from None
    if tensors:
        raise ArtifactError(f"{TENSORS_NAME} has tensors of no site: {', '.join(sorted(tensors))}.")
    return Replaced(plain, made, dict(document["left"]))


def _loaded(plain: nn.Module, item: Mapping[str, Any], tensors: dict[str, Tensor]) -> Replacement:
    """One site from its JSON, taking its tensors out of the mapping."""
    path, sizes = item["path"], (item["d_model"], item["d_out"], item["hidden"])
    if any(type(size) is not int or size < 1 for size in sizes):
        raise ArtifactError(f"{JSON_NAME}: {path!r} has sizes {sizes}; expected integers >= 1.")
    d_model, d_out, hidden = sizes
    shapes = ((hidden, d_model), (hidden,), (d_out, hidden), (d_out,))
    values = {}
    for name, shape in zip(PARAMETERS, shapes, strict=True):
        value = tensors.pop(f"{path}.{name}", None)
        if value is None or tuple(value.shape) != shape or not value.isfinite().all():
            saw = "nothing" if value is None else list(value.shape)
            raise ArtifactError(
                f"{TENSORS_NAME}: {path}.{name} is {saw}; expected finite values of shape {list(shape)}."
            )
        values[name] = value
    original = _linear_at(plain, path, d_model, d_out)
    weight = original.weight
    assert isinstance(weight, Tensor)
    with torch.device("meta"):
        block = ProjectionMLP(d_model, d_out, hidden, bool(item["residual"]))
    block.to_empty(device=weight.device).to(weight.dtype).train(original.training)
    block.load_state_dict(values)
    block.requires_grad_(weight.requires_grad)
    return Replacement(
        **{key: item[key] for key in ("name", "path", "role", "d_model", "d_out", "hidden")},
        figures=Fitted(**item["figures"]),
        parameters=sum(p.numel() for p in block.parameters()),
        dense_parameters=item["dense_parameters"],
        macs=hidden * (d_model + d_out),
        dense_macs=d_model * d_out,
        original=original,
        block=block,
    )


def _linear_at(plain: nn.Module, path: str, d_model: int, d_out: int) -> nn.Module:
    """The linear layer at a path. Raises ProjectionError if there is none of these sizes."""
    try:
        layer = plain.get_submodule(path)
    except AttributeError:
        layer = None
    weight = getattr(layer, "weight", None)
    linear = isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    wanted = [d_out, d_model] if isinstance(layer, nn.Linear) else [d_model, d_out]
    if layer is None or not linear or weight is None or list(weight.shape) != wanted:
        saw = "nothing" if layer is None else f"a {type(layer).__name__}"
        shape = "" if weight is None else f" of weight {list(weight.shape)}"
        raise ProjectionError(
            f"{type(plain).__name__} has {saw}{shape} at {path!r}; expected a linear layer from {d_model} to "
            f"{d_out} features. Load into the architecture that the projections were replaced in, once."
        )
    return layer
