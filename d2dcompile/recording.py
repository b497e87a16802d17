"""Record which experts the tokens of real batches choose, for tuning on a model's own routing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attachment import attached
from .errors import CalibrationError
from .kernels.gate import gate
from .measuring import Measuring
from .probe import arguments, probing

MOST_ROWS = 1 << 14  # tokens a site: masks of 112 experts then take 1.8 MB


class Recording(Measuring):
    """Observer that keeps the masks of the first tokens of every site."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[str, list[Tensor]] = {}

    def seen(self, index: int, x: Tensor, offsets: Tensor) -> None:
        """Keep the masks of one block's rows x [..., D]."""
        state = self._running[index]
        held = self.masks.setdefault(state.site.name, [])
        missing = MOST_ROWS - sum(map(len, held))
        if missing > 0:
            rows = x.reshape(-1, x.shape[-1])[:missing]
            router1, router2 = (w.to(x) for w in state.routers)
            scores = F.linear(F.relu(F.linear(rows, router1)), router2).abs()
            held.append(gate.meaning(scores, state.tau_on(x.device), state.rule).cpu())


def record_masks(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Which experts tokens choose at the present tau: {site name: [rows, E] bool}, in order of the calls.

    batches: as for `convert`; at most MOST_ROWS tokens a site are kept.

    Raises NoConversionError if no conversion is attached, CalibrationError for no batches.
    """
    attached(model)
    observer = Recording()
    with probing(model, observer) as call:
        for batch in batches:
            args, kwargs = arguments(batch)
            call(*args, **kwargs)
    if not observer.masks:
        raise CalibrationError("There are no batches to record; expected at least one.")
    return {name: torch.cat(parts) for name, parts in observer.masks.items()}
