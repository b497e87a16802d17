"""Results as JSON: what was measured, by which command, seeds, versions and processor."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import d2dcompile as d2d

from .steps import code

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


def versions(device: torch.device) -> dict[str, str]:
    """Of Python, torch and d2dcompile, and the processor that ran."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "d2dcompile": d2d.__version__,
        "processor": processor(device),
        "threads": str(torch.get_num_threads()),
        "code": code(),
    }


def processor(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write(
    path: Path,
    *,
    command: str,
    seeds: Sequence[int],
    seconds: float,
    device: torch.device,
    payload: Mapping[str, Any],
) -> None:
    """Write a result; numbers are rounded to six digits, NaN and infinity are errors."""
    value = {
        "name": path.stem,
        "command": command,
        "seeds": list(seeds),
        "versions": versions(device),
        "seconds": round(seconds),  # of the run that wrote this, what it found done not counted
        **payload,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(value), indent=1, allow_nan=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A result as written."""
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
