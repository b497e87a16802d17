"""Skeletons to source to module: the Triton kernels of one kind of block, as a file that can be read.

A skeleton is a file of kernels/gpu. A generated file holds its functions with the block's sizes and its
activation in place, is named by a hash of its content, and lies in the user's cache folder, where Triton
reads it again: edit a copy to try a change.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from ..dumping import dump_text
from ..store import folder

SKELETONS = Path(__file__).parent / "gpu"
STAND_INS = ("activation",)  # functions of skeletons that a block's own take the place of
_LOCK = threading.RLock()  # a file that imports others is imported under it


def render(
    title: str,
    skeletons: Sequence[str],
    constants: Mapping[str, bool | int | str],
    functions: str = "",
) -> str:
    """The source of skeletons in order, with their constants replaced and `functions` put first.

    title: what the file is for, its docstring. functions: Triton source that the skeletons call.
    Raises KeyError for a skeleton's constant that has no value.
    """
    values: dict[str, str] = {}
    bodies: dict[str, str] = {}
    for name in skeletons:
        text = (SKELETONS / name).read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                constant = node.targets[0].id
                values[constant] = f"{constant} = tl.constexpr({constants[constant]!r})"
            elif isinstance(node, ast.FunctionDef) and node.name not in STAND_INS:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                bodies[node.name] = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    head = f'"""{title}"""\n\nimport triton\nimport triton.language as tl\n\n'
    parts = [functions.strip(), *bodies.values()]
    return head + "\n".join(values.values()) + "\n" + "".join(f"\n\n{p}\n" for p in parts if p)


def path_of(source: str) -> Path:
    """Where the file of a source lies, written there first if need be."""
    name = f"d2d_{hashlib.sha256(source.encode()).hexdigest()[:16]}.py"
    path = folder() / "triton" / name
    if not path.exists() or path.read_text(encoding="utf-8") != source:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(source)
        Path(temporary).replace(path)
    return path


@lru_cache(maxsize=1024)
def module(source: str) -> ModuleType:
    """The module of a source, imported once a process from its file."""
    path = path_of(source)
    dump_text(path.name, source)
    return _imported(path)


def sibling(file: str, name: str) -> ModuleType:
    """The module of another generated file in the folder of this one, imported once a process."""
    path = Path(file).with_name(name)
    with _LOCK:
        return sys.modules.get(_name(path)) or _imported(path)


def _name(path: Path) -> str:
    return f"d2dcompile.kernels._generated.{path.stem}"


def _imported(path: Path) -> ModuleType:
    with _LOCK:
        found = importlib.util.spec_from_file_location(_name(path), path)
        assert found is not None and found.loader is not None
        made = importlib.util.module_from_spec(found)
        sys.modules[_name(path)] = made  # Triton and pickles look functions up by it
        found.loader.exec_module(made)
    return made
