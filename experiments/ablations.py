"""What each part of D2DMoE is worth, on the digits ViT: one part changed at a time.

The reference: ReLU, square Hoyer, balanced k-means on weights, experts of the experiment's size, routers on
norms, dynamic k. Base models are those of experiments/digits.py, and are read from its folder if they are
there. `python -m experiments.ablations`.

- no sparsification: ReLU alone, and GELU alone, as they were trained; L1 in the place of Hoyer, and Hoyer,
  each at the weight that is best on validation images.
- static k: the same routers, the k best experts of every token.
- MoEfication's router target: activation sums, cross-entropy, static k.
- routers: "classify" (MoEfication's target, compared by tau), "centroid" (no training); a tenth of the
  experts shared, so that they always run.
- expert size: 4 to 64 neurons; all 256 in one leave nothing to choose.
- clustering: random, and by co-activation.
- projections: Q, K, V and O replaced by ReLU blocks before the finetuning, and converted too; more is
  converted then, so compare its `model_cost` with the others', not its `cost`.
- int8: the blocks' weights rounded to 8 bits per row before the conversion; quality alone, no kernel's time.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from experiments import lab
from experiments.lab.methods import on
from experiments.vit import QUICK, Sizes, Stages, digits

EXPERT_SIZES = (4, 8, 16, 32, 64, 256)
WEIGHTS = {  # to choose from, in that of the experiment; the first two in the quick form
    "hoyer": (1.0, 0.3, 3.0, 10.0, 30.0),
    "l1": (1.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
}
TAUS = (0.0, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)


class Variants:
    """The curves of one seed, each a model converted in one way."""

    def __init__(self, stages: Stages, quick: bool) -> None:
        self.stages, self.quick = stages, quick
        self.task, self.steps, self.device = stages.task, stages.steps, stages.device
        self.taus = (0.0, 0.3, 1.0) if quick else TAUS
        self.curves: dict[str, list[lab.Point]] = {}
        self.weights: dict[str, float] = {}  # chosen, by penalty

    def add(
        self,
        name: str,
        model: nn.Module,
        key: dict[str, Any],
        **changes: Any,
    ) -> nn.Module:
        """Convert a copy of the model and measure it over tau; the copy."""
        model = copy.deepcopy(model)
        config = self.stages.sizes.config(**changes)
        lab.converted(
            self.steps, f"ablation-{slug(name)}", key, self.task, model, config, self.device
        )
        self.curves[name] = lab.dynamic(self.task, model, self.device, self.taus)
        return model

    def run(self) -> None:
        """All of them."""
        sizes, weight = self.stages.sizes, self.stages.sizes.weight
        dense, dense_key = self.stages.dense()
        relu, relu_key = self.stages.finetuned(None)
        sparse, key = self.stages.finetuned("hoyer", weight)
        reference = self.add("reference", sparse, key)
        self.static(reference, key)
        self.add("no sparsification, ReLU", relu, relu_key)
        self.add("no sparsification, GELU", dense, dense_key)
        self.add("L1 instead of Hoyer, best weight", *self.chosen("l1"))
        self.add("Hoyer, best weight", *self.chosen("hoyer"))
        self.sizes(sparse, key)
        self.add("random experts", sparse, key, clustering="random")
        self.add("co-activation clustering", sparse, key, clustering="coactivation")
        self.add("router: classify", sparse, key, router="classify")
        self.add("router: centroid", sparse, key, router="centroid")
        shared = max(sizes.hidden // sizes.expert // 10, 1)
        self.add("shared experts", sparse, key, shared_experts=shared)
        self.add(
            "int8 weights", rounded(sparse, self.task.test[0], self.device), {**key, "int8": 1}
        )
        self.projections()

    def chosen(self, penalty: str) -> tuple[nn.Module, dict[str, Any]]:
        """The model finetuned with a penalty that is within 1 % of dense at least cost, on validation data.

        Of equal costs, and where none stays, the one with the better loss over all taus.
        """
        task = replace(self.task, test=self.task.validation)
        base = lab.dense_point(task, self.stages.dense()[0], self.device).quality
        found = []
        for times in WEIGHTS[penalty][:2] if self.quick else WEIGHTS[penalty]:
            weight = times * self.stages.sizes.weight
            model, key = self.stages.finetuned(penalty, weight)
            tried, config = copy.deepcopy(model), self.stages.sizes.config()
            step = f"validation-{penalty}-{weight:g}"
            lab.converted(self.steps, step, key, task, tried, config, self.device)
            points = lab.dynamic(task, tried, self.device, self.taus)
            metric, higher = next(iter(task.metrics.items()))
            cost = lab.critical(points, base[metric], metric, higher)
            loss = sum(point.quality["cross-entropy"] for point in points)
            found.append((math.inf if cost is None else cost, loss, weight, model, key))
        *_, self.weights[penalty], model, key = min(found, key=lambda one: one[:2])
        return model, key

    def static(self, reference: nn.Module, key: dict[str, Any]) -> None:
        """Static k on the reference's routers, and on MoEfication's."""
        shares = (1.0, 0.5, 0.2) if self.quick else lab.SHARES
        task, sizes, calibration = (
            self.task,
            self.stages.sizes,
            on(self.device, self.task.calibration),
        )
        self.curves["static k"] = lab.emulated(
            task, reference, self.device, lab.static_topk(reference, shares)
        )
        blocks = lab.blocks_of(reference, calibration[0])
        routers = self.steps.tensors(
            "ablation-moefication",
            {
                **key,
                "expert": sizes.expert,
                "router": sizes.router,
                "epochs": sizes.epochs,
                "code": lab.code(),
            },
            lambda: lab.fit_moefication(
                reference, blocks, calibration, width=sizes.router, epochs=sizes.epochs
            ),
        )
        self.curves["static k, MoEfication's router"] = lab.emulated(
            task, reference, self.device, lab.moefication(reference, routers, shares)
        )

    def sizes(self, sparse: nn.Module, key: dict[str, Any]) -> None:
        """Other expert sizes; one expert per block has no choice, so it is left out."""
        sizes = self.stages.sizes
        for size in (16,) if self.quick else EXPERT_SIZES:
            if size != sizes.expert and size < sizes.hidden:
                self.add(f"experts of {size}", sparse, key, expert_size=size)

    def projections(self) -> None:
        """Q, K, V and O replaced by blocks, finetuned and converted with the others."""
        model, key = self.stages.projected(self.stages.sizes.weight, 2 if self.quick else 20)
        self.add("FFN and projections", model, key)


@torch.no_grad()
def rounded(model: nn.Module, batch: lab.Batch, device: torch.device) -> nn.Module:
    """A copy whose blocks' weights are int8 values times a scale per output row, as fp32."""
    model = copy.deepcopy(model)
    for block in lab.blocks_of(model, lab.moved(batch, device)):
        for module in (*block.ups.values(), block.down):
            weight = module.weight
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            weight.copy_((weight / scale).round() * scale)
    return model


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def main(argv: Sequence[str] | None = None) -> int:
    """Run all seeds, write results; the exit status."""
    run = lab.session("ablations", __doc__, argv, shared="digits")
    sizes = QUICK if run.quick else Sizes()
    curves: dict[str, list[list[lab.Point]]] = {}
    dense, weights = [], []
    for seed in run.seeds:
        stages = Stages(digits(seed, sizes), run.steps(seed), run.device, sizes)
        variants = Variants(stages, run.quick)
        variants.run()
        for name, points in variants.curves.items():
            curves.setdefault(name, []).append(points)
        dense.append(dict(lab.dense_point(stages.task, stages.dense()[0], run.device).quality))
        weights.append(variants.weights)
        run.say(f"seed {seed}: {len(variants.curves)} variants")
    run.write(
        "ViT on digits: what each part is worth",
        {"accuracy": True, "cross-entropy": False},
        curves,
        dense,
        {"sizes": repr(sizes), "weights": weights},
        ours="reference",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
