"""dynamic_mlp: a converted block in one call, from its router to its output.

    scores = |relu(x router1^T) router2^T|      mask = gate(scores, tau)
    lists = dispatch(mask)                      y = expert_mlp(x, *lists, slabs, biases, f)

x [..., D] fp32 or bf16, the dtype of the weights   y [..., width] in the same dtype
record: [..] int64, the addresses and strides (kernels.native) that `Prepared` makes of other operands.
hidden: relu(x router1^T) [..., R] where blocks share it (kernels.router_hidden), else None.

Inference only: it has no gradient. Szatkowski et al. 2024, arXiv:2310.04361, equation 4.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelError
from .. import native
from ..base import op
from ..dispatch import dispatch
from ..expert_mlp import expert_mlp
from ..gate import gate


@dataclass(eq=False)
class Prepared:
    """A block's operands, the record that kernels read them from, and what was made for kernels only.

    Attributes:
        router1, router2, tau, w_up, w_gate, w_down, b_up, b_gate, b_down, activation: see expert_mlp
            and gate; kept alive by this object. When it dies its record names no kernel any more.
        packs: whether a kernel may keep a copy of the weights in its own order.
        int8: whether one token runs on an int8 copy of the experts' weights, whose output is a relative
            .01 to .02 off with random weights, .01 to .03 in MiniLM.
        record: the table, see kernels.native.
        packed: the copy in the kernel's order, once a call wanted it; None before, and where it is not
            allowed.
        quantised: the int8 copy, likewise.
        forced: [rows, E] bool masks that replace the gate's, row i of a call taking mask i modulo rows;
            None outside of measurements at a given executed share.
    """

    router1: Tensor
    router2: Tensor
    tau: Tensor
    w_up: Tensor
    w_gate: Tensor | None
    w_down: Tensor
    b_up: Tensor | None
    b_gate: Tensor | None
    b_down: Tensor | None
    activation: str
    packs: bool = True
    int8: bool = False
    record: Tensor = field(init=False)
    packed: Tensor | None = None
    quantised: Tensor | None = None
    forced: Tensor | None = None
    kept: list[Tensor] = field(default_factory=list)  # other memory that the record points to

    def __post_init__(self) -> None:
        self.record, number = native.table(), next(_NUMBERS)
        native.write(self.record, id=number)
        _PREPARED[number] = self
        weakref.finalize(self, native.write, self.record, run=0).atexit = False

    def weights(self) -> dict[str, Tensor | None]:
        """Slabs and biases by operand name."""
        return {name: getattr(self, name) for name in native.SLABS}

    @staticmethod
    def of(record: Tensor) -> Prepared:
        """The block that a record was made for; KernelError if it exists no more."""
        found = _PREPARED.get(native.read(record, "id"))
        if found is None:
            raise KernelError(
                "A compiled graph was called with the record of a block that was detached or converted "
                "again. Call the compiled model itself, which looks its blocks up, not a captured graph."
            )
        return found

    @property
    def experts(self) -> int:
        return self.router2.shape[0]


_PREPARED: weakref.WeakValueDictionary[int, Prepared] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)


@op(version=2)
def dynamic_mlp(x: Tensor, record: Tensor, width: int, hidden: Tensor | None = None) -> Tensor:
    """The block's output [..., width] from the experts that its router chooses for each row of x."""
    block = Prepared.of(record)
    first = F.relu(F.linear(x, block.router1)) if hidden is None else hidden
    scores = F.linear(first, block.router2).abs()
    mask = gate(scores, block.tau)
    if block.forced is not None:
        rows = torch.arange(mask[..., 0].numel()) % len(block.forced)
        mask = block.forced.to(mask.device)[rows.to(mask.device)].reshape(mask.shape)
    lists = dispatch(mask)
    weights = block.weights().values()
    result: Tensor = expert_mlp(x, *lists, *weights, None, [], block.activation)
    return result


@dynamic_mlp.fake
def _(x: Tensor, record: Tensor, width: int, hidden: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


@dynamic_mlp.flops
def _(x: Tensor, record: Tensor, width: int, hidden: Tensor | None = None, **_: object) -> int:
    """Two FLOPs per multiply-add of router and chosen experts, as the ops it stands for count them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        dynamic_mlp.meaning(x, record, width, hidden)
    return int(counter.get_total_flops())


from . import cpu as cpu  # noqa: E402  (registers the implementation of the op above)
