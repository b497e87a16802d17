"""How a site's weights lie in memory: expert slabs as views, neuron order, and digests of values.

A neuron is a row of up and gate and a column of down. Attached weights are neuron-major, [H, D] each, so
that an expert is one contiguous slab, behind the shape that the model's own code expects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .ir import Site

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def slabs(site: Site, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The expert slabs w_up, w_gate, w_down [H, D] and biases, as views of a site's parameters."""
    found: dict[str, Tensor] = {}
    for role in site.params:
        matrix = _neuron_major(site, role, weights[role])
        if role == "gate_up":
            found.update({f"w_{half}": part for half, part in _halves(site, matrix).items()})
        else:
            found[f"w_{role}"] = matrix
    for role in site.biases:
        bias = weights[f"{role}.bias"]
        if role == "gate_up":
            found.update({f"b_{half}": part for half, part in _halves(site, bias).items()})
        elif role in ("up", "gate", "down"):
            found[f"b_{role}"] = bias
    return found


def _halves(site: Site, fused: Tensor) -> dict[str, Tensor]:
    """The gate and up rows of a fused matrix or bias, as views."""
    parts = (fused[0::2], fused[1::2]) if site.interleaved else fused.chunk(2)
    return dict(zip(site.halves, parts, strict=True))


def _neuron_major(site: Site, role: str, weight: Tensor) -> Tensor:
    """[H, D] (or [2 H, D]) view of a weight: neurons are rows of up, columns of down.

    A convolution of kernel 1 has axes of size one after those two.
    """
    matrix = weight.view(weight.shape[:2])
    return matrix if _neurons_first(site, role) else matrix.t()


def _neurons_first(site: Site, role: str) -> bool:
    return (role == "down") == (role in site.transposed)


def permuted(site: Site, role: str, tensor: Tensor, order: Tensor) -> Tensor:
    """A site's tensor with its neurons in `order`, neuron-major in memory, in its own shape."""
    base, _, bias = role.partition(".")
    if (base == "down" and bias) or base not in site.params:
        return tensor
    order = order.to(tensor.device)
    if base == "gate_up" and site.interleaved:
        order = torch.stack([2 * order, 2 * order + 1], dim=1).flatten()
    elif base == "gate_up":
        order = torch.cat([order, order + len(order)])
    if bias:
        return tensor[order]
    matrix = _neuron_major(site, role, tensor)
    ordered = matrix[order] if _neurons_first(site, role) else matrix[order].t()
    return ordered.view(tensor.shape)


def digest(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of a tensor's values in row-major order of its shape, as stored or cast to `dtype`."""
    values = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    return hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def digests(tensor: Tensor) -> dict[str, str]:
    """Digests of a tensor as it is and as cast to each float dtype a model is served in."""
    dtypes = {tensor.dtype, *DTYPES}
    return {
        str(dtype).removeprefix("torch."): digest(tensor, dtype)
        for dtype in sorted(dtypes, key=str)
    }


def hashes_of(site: Site, weights: Mapping[str, Tensor], order: Tensor) -> dict[str, Any]:
    """Per tensor of a site: shape, and digests before ("dense") and after ("permuted")."""
    return {
        role: {
            "shape": list(weights[role].shape),
            "dense": digests(weights[role]),
            "permuted": digests(permuted(site, role, weights[role].detach(), order)),
        }
        for role in site.tensors
    }


def overlaps(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one storage have memory in common, or may have."""

    def span(t: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return int(t.storage_offset()), int(t.storage_offset() + last)

    (a, b), (c, d) = span(left), span(right)
    return bool(left.numel() and right.numel() and a <= d and c <= b)
