"""expert_mlps in Triton: the decode kernels of expert_mlp for several sites, as one launch each.

Each site has the schedule that it has alone. Those that run every expert, or group tokens by expert, are
launched alone: many tokens take longer than launches.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...gpu_blocks import GpuSchedule, GpuSpec
from .. import device
from ..beside import launch_beside
from ..expert_mlp import gpu as single
from ..expert_mlp.call import Call
from ..expert_mlp.call import launches as launches_of
from ..launching import Launched, noting
from ..native import SLABS
from . import expert_mlps, of_sites


def accepts(x: Tensor, lists: list[Tensor], slabs: list[Tensor | None], activation: str) -> bool:
    """Whether the kernels of each site's expert_mlp take its operands."""
    parts = zip(of_sites(lists, 3), of_sites(slabs, len(SLABS)), strict=True)
    return all(single.accepts(x, *own, *weights, None, [], activation) for own, weights in parts)


def run(
    x: Tensor, lists: list[Tensor], slabs: list[Tensor | None], activation: str
) -> list[Tensor]:
    """The outputs [..., OUT_i] from the chosen experts of each site."""
    x = x.contiguous()
    made = [
        single.prepare(x, (own[0], own[1], own[2]), weights, [], activation)
        for own, weights in zip(of_sites(lists, 3), of_sites(slabs, len(SLABS)), strict=True)
    ]
    if x.numel():
        with device.on(x.device):
            run_calls([(call, schedule) for _, call, schedule in made])
    return [y for y, _, _ in made]


def run_calls(calls: Sequence[tuple[Call, GpuSchedule]]) -> None:
    """Run calls by their schedules, those that decode in one launch for each of their kernels."""
    decoding: list[list[Launched]] = []
    for call, schedule in calls:
        if schedule.strategy != "decode":
            call.run(schedule)
            continue
        with noting() as noted:
            call.run(schedule)
        decoding.append(noted)
    launch_decoding(decoding)


def launch_decoding(calls: Sequence[Sequence[Launched]]) -> None:
    """Make what calls launch, as one launch for each kernel of those with as many warps."""
    alike: dict[tuple[tuple[str, int], ...], list[Sequence[Launched]]] = {}
    for noted in calls:
        key = tuple((item.name, item.options["num_warps"]) for item in noted)
        alike.setdefault(key, []).append(noted)
    for sites in alike.values():
        for items in zip(*sites, strict=True):
            launch_beside(items, persistent=items[0].name.startswith("decode_up"))


def launches(
    specs: Sequence[GpuSpec], tokens: int, schedules: Sequence[GpuSchedule]
) -> list[Launched]:
    """What decoding so many tokens at sites of these kinds launches, without data and without a device."""
    pairs = zip(specs, schedules, strict=True)
    alone = [launches_of(spec, tokens, schedule) for spec, schedule in pairs]
    with noting() as noted:
        launch_decoding(alone)
    return noted


device.register(expert_mlps, run, accepts)
