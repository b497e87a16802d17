"""Steps: named results in a folder, made once, found again, never mixed up.

A result's file is `<name>-<key>`, where the key is a hash of the settings it was made with: other
settings are another file, so an experiment of other settings never resumes from an old state. What the
library or a rival makes has `code` among its settings. Files appear by renaming, so a killed process leaves
none half-written.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

import d2dcompile
import d2dcompile.kernels
import d2dcompile.passes

HERE = Path(__file__).parent


def key_of(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits that settings with other values do not share; TypeError for what JSON lacks."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code() -> str:
    """Twelve hex digits of the code that converts and measures: the library's and the experiments'.

    Part of the keys of what is made by it, so that a mended fit or rival is run anew; trainings are not.
    Of the files as they were when this module was imported.
    """
    return CODE


def _code() -> str:
    found, library = hashlib.sha256(), (d2dcompile, d2dcompile.passes, d2dcompile.kernels)
    for folder in (HERE.parent, *(Path(str(module.__file__)).parent for module in library)):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".h")):
            found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


CODE = _code()


class Partial:
    """The state of a loop that is under way: saved every so often, gone when the loop has ended.

    Holds what `torch.load(weights_only=True)` reads: tensors, numbers, text, lists and dicts of them.
    """

    def __init__(self, path: Path, every: float = 60.0) -> None:
        self.path = path
        self._every = every
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The saved state, on the CPU, or None where the loop has to begin."""
        if not self.path.is_file():
            return None
        state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        return state

    def save(self, state: Callable[[], Mapping[str, Any]]) -> bool:
        """Save when `every` seconds have passed since the last time; whether it did."""
        if time.monotonic() - self._last < self._every:
            return False
        new = self.path.with_suffix(".new")
        torch.save(dict(state()), new)
        new.replace(self.path)
        self._last = time.monotonic()
        return True

    def done(self) -> None:
        """The loop has ended and its result is kept elsewhere."""
        self.path.unlink(missing_ok=True)


class Steps:
    """Results under a folder. Every method makes its result where it is missing, and reads it else."""

    def __init__(self, folder: Path, save_every: float = 60.0) -> None:
        self.folder = folder
        self._save_every = save_every
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, settings: Mapping[str, Any], suffix: str) -> Path:
        return self.folder / f"{name}-{key_of(settings)}{suffix}"

    def partial(self, name: str, settings: Mapping[str, Any]) -> Partial:
        """Where a loop of this name and settings keeps its running state."""
        return Partial(self.path(name, settings, ".partial"), self._save_every)

    def value(self, name: str, settings: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """A JSON value. What is made is returned as it reads back, so both ways give the same."""
        path = self.path(name, settings, ".json")
        if not path.is_file():
            new = path.with_suffix(".new")
            new.write_text(json.dumps(make(), indent=1, allow_nan=False) + "\n")
            new.replace(path)
        return json.loads(path.read_text())

    def tensors(
        self, name: str, settings: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Tensors by name, on the CPU."""
        path = self.path(name, settings, ".safetensors")
        if not path.is_file():
            new = path.with_suffix(".new")
            save_file({k: v.detach().cpu().contiguous() for k, v in make().items()}, new)
            new.replace(path)
        return load_file(path)

    def weights(
        self,
        name: str,
        settings: Mapping[str, Any],
        model: nn.Module,
        make: Callable[[], None],
    ) -> bool:
        """Weights of a model: loaded into it, or left in it by `make`; whether they were made now.

        Tied weights are stored once.
        """
        path = self.path(name, settings, ".safetensors")
        if path.is_file():
            load_model(model, path)
            return False
        make()
        new = path.with_suffix(".new")
        save_model(model, str(new))
        new.replace(path)
        return True

    def folder_of(
        self, name: str, settings: Mapping[str, Any], make: Callable[[Path], None]
    ) -> Path:
        """A folder that `make` fills."""
        path = self.path(name, settings, "")
        if not path.is_dir():
            new = path.with_name(path.name + ".new")
            shutil.rmtree(new, ignore_errors=True)
            make(new)
            new.rename(path)
        return path
