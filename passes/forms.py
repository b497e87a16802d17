"""Forms: in which ops a converted block stands in a graph, and which operands those take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..ir import Site
from ..kernels.native import SLABS

Form = Literal["ops", "routed", "grouped", "int8", "record", "learning"]
"""What stands for a site: router, gate, dispatch and experts; route and experts; these with other sites that
read the same x, in one op each; route and experts with int8 copies of the slabs besides; one op with a
record; or the first with gradients for routers."""
ROUTED: tuple[Form, ...] = ("routed", "int8")  # by an op of their own
COPIED = ("q_up", "q_gate", "q_down", "scales", "unit")  # see kernels.int8.Copy


@dataclass(frozen=True)
class Choice:
    """How a site's experts are chosen, as far as its graph says it; forms but "ops" know the default only.

    Attributes:
        rule: the gate's.
        exact: None where the router's scores are compared, or to compare the experts' exact output norms
            to this power (see `testing.oracle`).
    """

    rule: str = "max"
    exact: float | None = None


BY_TAU = Choice()  # the default


def operand_names(
    site: Site, form: Form = "ops", follows: bool = False, leads: bool = False
) -> tuple[str, ...]:
    """Which operands a site's nodes take, in order: router1, router2, tau, then present slabs,
    with the form "int8" then their copy.

    The form "record" takes a record only, the form "learning" aims too. follows: whether the site shares
    the first router layer of an earlier one, and so takes no router1. leads: whether others share its own,
    for which the form "record" takes the layer's record.
    """
    if form == "record":
        return ("record", "layer") if leads else ("record",)
    present = {"w_up", "w_down"}
    if site.kind == "glu":
        present.add("w_gate")
    for role in site.biases:
        if role == "gate_up":
            present |= {"b_up", "b_gate"}
        elif role in ("up", "gate", "down"):
            present.add(f"b_{role}")
    aims = ("aims",) if form == "learning" else ()
    first = () if follows else ("router1",)
    copied = [name for name in COPIED if name != "q_gate" or site.kind == "glu"]
    after = copied if form == "int8" else ()
    return (*first, "router2", "tau", *aims, *(name for name in SLABS if name in present), *after)


def has_layer(form: Form, choice: Choice) -> bool:
    """Whether the first router layer is plain nodes."""
    return form == "learning" or (form == "ops" and choice.exact is None)
