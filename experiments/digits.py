"""Quality against cost on scikit-learn's digits: D2DMoE, its rivals and dense models of equal cost.

A ViT is trained with GELU, then fine-tuned with ReLU, with and without a square Hoyer penalty; D2DMoE,
static top-k and MoEfication run on the same experts, TEAL and WINA drop channels, early exit skips layers.
All models have had the same number of training steps. `python -m experiments.digits`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from experiments import lab
from experiments.lab.methods import model_macs, on
from experiments.vit import QUICK, Sizes, Stages, digits

SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
EXECUTED = (0.9, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07)
NARROW = (0.25, 0.125)
TAUS = (0.0, 0.001, 0.003, 0.01, *lab.TAUS[1:])  # most of the sparse models' costs lie below .02
FEW = (0.0, 0.2, 0.5, 1.0)


def methods_of(
    stages: Stages, quick: bool
) -> tuple[dict[str, list[lab.Point]], dict[str, float], dict[str, Any]]:
    """The curves of one seed by method, the dense model's quality, and notes."""
    task, steps, device, sizes = stages.task, stages.steps, stages.device, stages.sizes
    taus = FEW if quick else TAUS
    shares = (1.0, 0.5, 0.2) if quick else lab.SHARES
    sparsities = (0.0, 0.5, 0.8) if quick else SPARSITIES
    calibration = on(device, task.calibration)
    curves: dict[str, list[lab.Point]] = {}

    dense, _ = stages.dense()
    base = lab.dense_point(task, dense, device)
    relu, relu_key = stages.finetuned(None)
    sparse, sparse_key = stages.finetuned("hoyer", sizes.weight)
    lab.converted(steps, "experts", sparse_key, task, sparse, sizes.config(), device)
    lab.converted(steps, "experts-relu", relu_key, task, relu, sizes.config(), device)

    def moefication(model: nn.Module, name: str, key: dict[str, Any]) -> list[lab.Point]:
        blocks = lab.blocks_of(model, calibration[0])
        settings = {**key, "expert": sizes.expert, "router": sizes.router, "epochs": sizes.epochs}
        settings["code"] = lab.code()
        routers = steps.tensors(
            name,
            settings,
            lambda: lab.fit_moefication(
                model, blocks, calibration, width=sizes.router, epochs=sizes.epochs
            ),
        )
        return lab.emulated(task, model, device, lab.moefication(model, routers, shares))

    def channels(model: nn.Module, name: str) -> None:
        blocks = lab.blocks_of(model, calibration[0])
        dropped = lab.teal(model, blocks, calibration, sparsities)
        curves[f"TEAL{name}"] = lab.emulated(task, model, device, dropped)
        curves[f"WINA{name}"] = lab.emulated(task, model, device, lab.wina(shares))

    curves["D2DMoE"] = lab.dynamic(task, sparse, device, taus)
    found = lab.per_site(task, sparse, device, (0.4,) if quick else EXECUTED)
    if found is not None:
        curves["D2DMoE, a tau per site"] = [curves["D2DMoE"][0], *found]
    curves["static top-k"] = lab.emulated(task, sparse, device, lab.static_topk(sparse, shares))
    curves["MoEfication"] = moefication(relu, "moefication", relu_key)
    curves["MoEfication, sparse model"] = moefication(sparse, "moefication-sparse", sparse_key)
    curves["oracle"] = lab.emulated(task, sparse, device, lab.oracle(sparse, taus))
    channels(dense, "")
    channels(sparse, ", sparse model")
    exits, _ = stages.exits()
    curves["early exit"] = lab.early_exit(task, exits, device)
    narrow = [round(share * sizes.hidden) for share in (NARROW[:1] if quick else NARROW)]
    trained = lab.narrower(
        task, lambda size: stages.dense(size)[0], dense, sizes.hidden, narrow, device
    )
    curves["dense, narrower"] = [base, *trained]
    notes = {
        "relu": dict(lab.dense_point(task, relu, device).quality),
        "sparsified": dict(lab.dense_point(task, sparse, device).quality),
        "macs_per_image": model_macs(dense, on(device, task.test)) / images_of(task.test),
        "per_site": found is not None,
    }
    return curves, dict(base.quality), notes


def images_of(batches: Sequence[lab.Batch]) -> int:
    """How many images there are."""
    return sum(len(batch["labels"]) for batch in batches)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all seeds, write results; the exit status."""
    run = lab.session("digits", __doc__, argv)
    sizes = QUICK if run.quick else Sizes()
    curves: dict[str, list[list[lab.Point]]] = {}
    dense, notes = [], []
    for seed in run.seeds:
        stages = Stages(digits(seed, sizes), run.steps(seed), run.device, sizes)
        found, quality, note = methods_of(stages, run.quick)
        for method, points in found.items():
            curves.setdefault(method, []).append(points)
        dense.append(quality)
        notes.append(note)
        run.say(f"seed {seed}: {note['sparsified']}")
    run.write(
        "ViT on digits: D2DMoE and its rivals",
        {"accuracy": True, "cross-entropy": False},
        curves,
        dense,
        {"sizes": repr(sizes), "per_seed": notes},
        ours="D2DMoE",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
