"""D2D_DUMP: a folder in which graphs and generated kernels are left to be read, numbered as they come."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from torch.fx import GraphModule

log = logging.getLogger(__name__)


def dump(stage: str, gm: GraphModule) -> None:
    """Write a graph's code to the folder that D2D_DUMP names, if it is set."""
    if os.environ.get("D2D_DUMP"):
        dump_text(f"{stage}.py", gm.print_readable(print_output=False))


def dump_text(name: str, text: str) -> None:
    """Write a text to the folder that D2D_DUMP names, if it is set, under a number and a name."""
    folder = os.environ.get("D2D_DUMP")
    if folder:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        number = len(list(path.iterdir()))
        (path / f"{number:03d}_{name}").write_text(text, encoding="utf-8")
        log.debug("wrote %s of %s", name, path)
