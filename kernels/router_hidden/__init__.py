"""router_hidden: the first router layer of blocks that share it, h = relu(x router1^T), once for all of them.

x [..., D] fp32 or bf16, the dtype of the weights   h [..., R] in the same dtype, R = width
record: [..] int64, what kernels read (kernels.native), of the `Layer` that it belongs to.

dynamic_mlp takes h in the place of its own first layer, with the same bits. Where no block of a call reads
scores, since all of them run every expert, kernels fill h with NaN instead, which would keep every expert.
Inference only: it has no gradient.
Szatkowski et al. 2024, arXiv:2310.04361, section 3.3, of whose routers each has a layer of its own.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError
from .. import native
from ..base import op
from ..dynamic_mlp import Prepared


@dataclass(eq=False)
class Layer:
    """A first router layer, the blocks that share it, and the record that kernels read it from.

    Attributes:
        blocks: with one router1 by value; kept alive, and their records with them.
        record: the table, see kernels.native. When this object dies it names no kernel any more.
    """

    blocks: Sequence[Prepared]
    record: Tensor = field(init=False)
    kept: list[Tensor] = field(default_factory=list)  # memory that the record points to

    def __post_init__(self) -> None:
        self.record, number = native.table(), next(_NUMBERS)
        native.write(self.record, id=number)
        _LAYERS[number] = self
        weakref.finalize(self, native.write, self.record, run=0).atexit = False
        cpu.fill(self)

    @staticmethod
    def of(record: Tensor) -> Layer:
        """The layer that a record was made for; KernelError if it exists no more."""
        found = _LAYERS.get(native.read(record, "id"))
        if found is None:
            raise KernelError(
                "A compiled graph was called with the record of routers that were detached or converted "
                "again. Call the compiled model itself, which looks its blocks up, not a captured graph."
            )
        return found


_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)


@op(version=1)
def router_hidden(x: Tensor, record: Tensor, width: int) -> Tensor:
    """relu(x router1^T) [..., width] of the layer that the record belongs to."""
    return F.relu(F.linear(x, Layer.of(record).blocks[0].router1))


@router_hidden.fake
def _(x: Tensor, record: Tensor, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


@router_hidden.flops
def _(x: Tensor, record: Tensor, width: int, **_: object) -> int:
    """Two FLOPs per multiply-add."""
    return 2 * int(x.numel()) * width


from . import cpu as cpu  # noqa: E402  (registers the implementation of the op above)
