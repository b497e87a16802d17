"""How long a converted model takes at a setting of taus, as a share of what it takes dense.

Both run compiled with the backend in one process, by turns in an order drawn anew, so that what the
machine does besides disturbs both alike; see `d2dcompile.timing`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .attachment import states
from .capture import unwrap
from .probe import arguments
from .setting import set_numbers
from .timing import alternate, estimate

REPEATS = 9  # turns of either


class Pace:
    """A model compiled with the backend, and its batches."""

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self._model = model
        self._calls = [arguments(batch) for batch in batches]
        self._dense = {state.site.name: state.span[0] for state in states(model)}
        self._compiled = torch.compile(unwrap(model), backend="d2dmoe")

    def ratio(self, setting: Mapping[str, float]) -> tuple[float, float]:
        """Seconds at the setting over seconds dense, medians, and the standard error of that ratio."""
        plain = unwrap(self._model)
        modes = [(module, module.training) for module in plain.modules()]
        runs = {"sparse": lambda: self._run(setting), "dense": lambda: self._run(self._dense)}
        try:
            plain.eval()
            with torch.no_grad():
                timed = alternate(runs, {name: estimate(r) for name, r in runs.items()}, REPEATS)
        finally:
            for module, mode in modes:
                module.training = mode
            set_numbers(self._model, setting)
        sparse, dense = timed["sparse"], timed["dense"]
        ratio = sparse.seconds / dense.seconds
        spread = [t.iqr / t.seconds / math.sqrt(t.samples) for t in (sparse, dense)]
        return ratio, ratio * math.hypot(*spread)

    def _run(self, setting: Mapping[str, float]) -> None:
        set_numbers(self._model, setting)
        for args, kwargs in self._calls:
            self._compiled(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
