"""Where Triton kernels can run, and what the launchers need to know of the place."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .base import Op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED_SMS = 3  # few, odd: programs of a persistent kernel then own several tiles each


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors; decided when Triton is imported."""
    return has_triton() and os.environ.get("TRITON_INTERPRET") == "1"


def on_gpu() -> bool:
    """Whether Triton kernels can run on a device of this machine."""
    return has_triton() and torch.cuda.is_available() and not interpreted()


def takes(tensors: Iterable[Tensor | None], device: torch.device) -> bool:
    """Whether all tensors are where Triton kernels run, on one device."""
    kind = "cpu" if interpreted() else "cuda"
    return device.type == kind and all(t is None or t.device == device for t in tensors)


@lru_cache(maxsize=16)
def multiprocessors(index: int) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def programs(device: torch.device, per_multiprocessor: int) -> int:
    """Programs of a persistent kernel."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    index = torch.cuda.current_device() if device.index is None else device.index
    return multiprocessors(index) * per_multiprocessor


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the one that kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are made: as torch's own matrix products are told to."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def register(op: Op, run: Callable[..., Any], accepts: Callable[..., bool]) -> None:
    """Let an op run in Triton on a GPU, and in Triton's interpreter where D2D_IMPL asks for that."""
    op.impl("gpu", run, platform=on_gpu, accepts=accepts)
    op.impl("interpreter", run, platform=interpreted, accepts=accepts, on_request=True)
