"""replace_projections: two-layer ReLU blocks in the place of the linear layers around attention.

A block costs as much as the layer, and is distilled from it on what it sees in the model; then it is a
feed-forward block like any other, which `sparsify` makes sparse and `convert` splits into experts.
Szatkowski et al. 2024, arXiv:2310.04361, section 3: conversion of attention projections.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .capture import unwrap
from .distilling import Fitted, ProjectionMLP, Recipe, distil, hidden_width
from .errors import CalibrationError, ProjectionError
from .finding import Projection, projections, sites_of
from .probe import arguments
from .replaced import Replaced, Replacement, put
from .sample import Sample

MEMORY = 4 << 30  # bytes of kept rows, over all sites; like Config.calibration_bytes


def replace_projections(
    model: nn.Module,
    batches: Iterable[Any],
    roles: str = "qkvo",
    width: float = 1.0,
    epochs: int = 20,
    lr: float = 1e-3,
    hoyer: float = 0.1,
    residual: bool = False,
    tokens: int = 32768,
    seed: int = 0,
    progress: bool = True,
) -> Replaced:
    """Replace the projections of a model's attention by distilled ReLU blocks of equal cost, in place.

    Each linear layer W [d_out, D] around an attention becomes down(relu(up(x))) with about
    width D d_out / (D + d_out) hidden neurons, under the module path of the layer and in its dtype. It
    regresses the layer's output on a uniform sample of the inputs that the layer has in the model.

    Args:
        batches: what the model is called with, as for `convert`; streamed once, eval, no gradients.
        roles: letters of what to replace; a fused matrix is replaced if all that it makes is wanted.
        width: cost of a block as a share of its layer's.
        epochs, lr: passes over the sample, and the learning rate of Adam (cosine to a thousandth).
        hoyer: weight of square Hoyer of the hidden values (1/H to 1, `d2dcompile.penalties.Hoyer`), rising
            linearly from 0, against the squared error as a share of the output's variance. Without it
            neurons end up active throughout and experts cannot be skipped; the official 1e-3 of the
            undivided penalty is .384 here for 384 neurons.
        residual: add x to the block's output, where D = d_out.
        tokens: rows kept for each input; fewer where 4 GiB would not hold them.
        seed: of sampling and training; same seed, same blocks.

    What cannot be replaced stays, and is listed in `left` of the result with its reason. Layers that read
    the same value share one sample. Raises ProjectionError for impossible arguments, where nothing can be
    replaced, and where the model does not run with the blocks; CalibrationError for no batches and values
    that are not finite. The model is then as before.
    """
    _check(roles, width, epochs, lr, hoyer, tokens, seed)
    plain = unwrap(model)
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise CalibrationError("There are no batches to distil on; expected at least one.")
    found, left = projections(plain, first, roles)
    blocks = {one.path: _block(plain, one, width, residual, seed) for one in found}
    if residual:
        for one in [one for one in found if one.site.d_model != one.site.d_out]:
            found.remove(one)
            left[one.site.name] = (
                f"maps {one.site.d_model} features to {one.site.d_out}: no residual"
            )
    found = _seen_again(plain, first, found, blocks, left)
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in left.items()) or "none matched"
        raise ProjectionError(
            f"No projection of {type(plain).__name__} can be replaced ({reasons}); expected linear modules "
            "around attention. d2dcompile.explain(model, ...) lists them."
        )
    groups = _groups(found)
    total = len(batches) if isinstance(batches, Sized) else None
    bar = tqdm(
        itertools.chain([first], stream), "inputs", total, disable=not progress, unit="batch"
    )
    samples = _sampled(plain, bar, groups, tokens, seed, left)
    recipe = Recipe(epochs, lr, hoyer, seed)
    fitted: dict[str, Fitted] = {}
    work = tqdm(total=epochs * len(groups), desc="distil", disable=not progress, unit="epoch")
    with work:
        for group in groups:
            ones = [one for one in group if one.site.name not in left]
            if ones:
                layers = [_layer(plain, one) for one in ones]
                rows, _ = samples[group[0].path].rows()
                figures = distil(
                    rows, layers, [blocks[one.path] for one in ones], recipe, lambda: _tick(work)
                )
                fitted.update((one.path, f) for one, f in zip(ones, figures, strict=True))
            del samples[group[0].path]
    done = [one for one in found if one.path in fitted]
    if not done:
        raise ProjectionError(f"No projection was called as a module: {'; '.join(left.values())}.")
    return Replaced(plain, [_entry(plain, o, blocks[o.path], fitted[o.path]) for o in done], left)


def _tick(work: Any) -> None:
    work.update()


def _check(
    roles: str, width: float, epochs: int, lr: float, hoyer: float, tokens: int, seed: int
) -> None:
    """Raise ProjectionError for arguments that mean nothing."""
    if not roles or set(roles) - set("qkvo"):
        raise ProjectionError(f"roles is {roles!r}; expected letters of 'qkvo'.")
    for name, value, low in (("width", width, 0.0), ("lr", lr, 0.0), ("hoyer", hoyer, -1e-30)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and low < value < float("inf")):
            least = "0 or more" if name == "hoyer" else "above 0"
            raise ProjectionError(f"{name} is {value!r}; expected a finite number {least}.")
    for name, count, lowest in (("epochs", epochs, 1), ("tokens", tokens, 2), ("seed", seed, 0)):
        if isinstance(count, bool) or not isinstance(count, int) or count < lowest:
            raise ProjectionError(f"{name} is {count!r}; expected an integer >= {lowest}.")


def _block(
    plain: nn.Module, one: Projection, width: float, residual: bool, seed: int
) -> ProjectionMLP:
    """An untrained block for a projection, where and in what dtype its layer is."""
    layer = plain.get_submodule(one.path)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    hidden = hidden_width(one.site.d_model, one.site.d_out, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = ProjectionMLP(one.site.d_model, one.site.d_out, hidden, residual)
    made.to(weight.device, weight.dtype).train(layer.training)
    return made.requires_grad_(weight.requires_grad)


def _seen_again(
    plain: nn.Module,
    example: Any,
    found: Sequence[Projection],
    blocks: Mapping[str, ProjectionMLP],
    left: dict[str, str],
) -> list[Projection]:
    """The projections whose blocks the matcher sees once they are there; the others go to `left`."""
    if not found:
        return []
    with _swapped(plain, {one.path: blocks[one.path] for one in found}):
        try:
            sites, _ = sites_of(plain, example)
        except Exception as error:
            raise ProjectionError(
                f"{type(plain).__name__} does not run with blocks in the place of its projections: "
                f"{error}. Expected code that only calls these modules; leave the ones whose attributes it "
                "reads out with roles=."
            ) from error
    seen = []
    for one in found:
        if (f"{one.path}.up.weight", f"{one.path}.down.weight") in sites:
            seen.append(one)
        else:
            left[one.site.name] = (
                "the matcher does not see a block in its place: its values go elsewhere"
            )
    return seen


@contextmanager
def _swapped(plain: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules at these paths for a while."""
    before = {path: plain.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            put(plain, path, module)
        yield
    finally:
        for path, module in before.items():
            put(plain, path, module)


def _groups(found: Sequence[Projection]) -> list[list[Projection]]:
    """Projections that read the same values in all of their calls."""
    groups: dict[Any, list[Projection]] = {}
    for one in found:
        groups.setdefault(one.sources, []).append(one)
    return list(groups.values())


def _sampled(
    plain: nn.Module,
    batches: Iterable[Any],
    groups: Sequence[Sequence[Projection]],
    tokens: int,
    seed: int,
    left: dict[str, str],
) -> dict[str, Sample]:
    """Rows of each group's input by the path of its first module, from an eager run of the model."""
    row = sum(group[0].site.d_model for group in groups) * 4
    limit = max(2, min(tokens, int(MEMORY / (1.5 * row))))  # Sample keeps 1.5 limits
    samples: dict[str, Sample] = {}
    called: set[str] = set()
    count = 0

    def hook(path: str, name: str, leads: bool) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            called.add(path)
            if leads:
                x = args[0] if args else next(iter(kwargs.values()))
                rows = x.detach().reshape(-1, x.shape[-1])
                if not rows.isfinite().all():
                    raise CalibrationError(
                        f"Batch {count} gives NaN or infinity before {name!r}; expected finite values. "
                        "Check that batch, and that the model is sound in this dtype."
                    )
                samples[path].add(rows, rows.new_empty(len(rows), 0))

        return see

    handles = []
    try:
        for i, group in enumerate(groups):
            samples[group[0].path] = Sample(limit, torch.Generator().manual_seed(seed + i))
            for one in group:
                see = hook(one.path, one.site.name, one is group[0])
                module = plain.get_submodule(one.path)
                handles.append(module.register_forward_pre_hook(see, with_kwargs=True))
        with _quiet(plain):
            for batch in batches:
                args, kwargs = arguments(batch)
                plain(*args, **kwargs)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    for group in groups:
        for one in group:
            if one.path not in called or group[0].path not in called:
                left[one.site.name] = "its module is not called: the model reads its weight"
    return samples


@contextmanager
def _quiet(plain: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; modes and the random state are put back."""
    modes = [(module, module.training) for module in plain.modules()]
    devices = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            plain.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _layer(plain: nn.Module, one: Projection) -> tuple[Tensor, Tensor | None]:
    """Weight [d_out, D] and bias of a projection's layer."""
    layer = plain.get_submodule(one.path)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    return (weight.t() if one.site.transposed else weight), bias


def _entry(plain: nn.Module, one: Projection, block: ProjectionMLP, figures: Fitted) -> Replacement:
    site = one.site
    layer = plain.get_submodule(one.path)
    return Replacement(
        name=site.name,
        path=one.path,
        role=site.role or "",
        d_model=site.d_model,
        d_out=site.d_out,
        hidden=block.up.out_features,
        figures=figures,
        parameters=sum(p.numel() for p in block.parameters()),
        dense_parameters=sum(p.numel() for p in layer.parameters()),
        macs=block.up.out_features * (site.d_model + site.d_out),
        dense_macs=site.d_model * site.d_out,
        original=layer,
        block=block,
    )
