"""A small ViT on scikit-learn's digits: task and stages that the experiments on it share.

1,797 images of 8 x 8 pixels; 2 x 2 patches give 16 tokens and a class token. Each seed draws its own split
into 1,197 training, 200 validation and 400 test images, and its own model: one image of 400 is .25 % of
accuracy, the standard error of 98 % is .7 %, and over three seeds' 1,200 images .4 %. Cross-entropy is
reported beside it because it moves where accuracy cannot.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import d2dcompile as d2d
from experiments import lab
from experiments.lab import Batch, Recipe, Steps, Task, moved, settings_of, trained

VALIDATION, TEST, CLASSES = 200, 400, 10
MODEL = ("width", "layers", "heads", "hidden", "batch")  # sizes that decide models and their data


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and lengths of its trainings; the paper's order of stages.

    Attributes:
        width, layers, heads, hidden: of the ViT.
        dense, finetune: optimizer steps of the dense model, and of what follows from it.
        rate: learning rate of what follows from it, here that of the dense model: a quarter of it left the
            finetuned models behind the dense one on the first seed's validation images.
        batch: images a step.
        expert, router: neurons per expert, and units of a router, which is small because the blocks are.
        epochs: of router fits.
        weight: of the square Hoyer penalty.
        batches: of 100 images, how many each of calibration, validation and test has at most; None for all.
    """

    width: int = 64
    layers: int = 3
    heads: int = 4
    hidden: int = 256
    dense: int = 1200
    finetune: int = 1200
    rate: float = 2e-3
    batch: int = 64
    expert: int = 4
    router: int = 16
    epochs: int = 30
    weight: float = 3.0
    batches: int | None = None

    def config(self, **changes: Any) -> d2d.Config:
        """How it is converted."""
        given: dict[str, Any] = {
            "expert_size": self.expert,
            "router_width": self.router,
            "router_epochs": self.epochs,
        }
        return d2d.Config(**{**given, **changes})


QUICK = Sizes(
    width=32, layers=2, heads=2, hidden=128, dense=40, finetune=20, router=8, epochs=3, batches=3,
)  # fmt: skip


def digits(seed: int, sizes: Sizes) -> Task:
    """The task of a seed: its split, its model's start, its order of batches."""
    images, labels = _data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 + seed))
    test, validation, train = order.split([TEST, VALIDATION, len(images) - TEST - VALIDATION])

    def batches(index: Tensor, size: int) -> Sequence[Batch]:
        return [
            {"pixel_values": images[part], "labels": labels[part]} for part in index.split(size)
        ]

    def batch(order_seed: int, step: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000_003 * (order_seed + 1) + step)
        part = train[torch.randint(len(train), (sizes.batch,), generator=generator)]
        shifted = _shifted(images[part], generator)
        return {"pixel_values": shifted, "labels": labels[part]}

    def model(hidden: int | None) -> nn.Module:
        return vit(sizes, hidden or sizes.hidden, seed)

    shifts = [batch(10_000, step) for step in range(20)]
    return Task(
        name="digits",
        settings={"split": seed, **{name: getattr(sizes, name) for name in MODEL}},
        model=model,
        train=batch,
        calibration=[*batches(train, 100), *shifts][: sizes.batches],
        validation=batches(validation, 100)[: sizes.batches],
        test=batches(test, 100)[: sizes.batches],
        loss=lambda model, batch: model(**batch).loss,
        quality=quality,
        metrics={"accuracy": True, "cross-entropy": False},
    )


def vit(sizes: Sizes, hidden: int, seed: int) -> nn.Module:
    """A ViT for ten classes with GELU, random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=hidden,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=CLASSES,
        initializer_range=0.08,  # 0.02 is for widths of 768 and learns slowly here
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config).eval()


def first_token(hidden: Tensor, batch: Batch) -> Tensor:
    """The class token's values [images, width] of hidden values [images, tokens, width]."""
    return hidden[:, 0]


def quality(call: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Accuracy and mean cross-entropy."""
    right, loss, count = 0, 0.0, 0
    for batch in batches:
        logits = call(**batch).logits.float()
        labels = batch["labels"]
        right += int((logits.argmax(-1) == labels).sum())
        loss += functional.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    return {"accuracy": right / count, "cross-entropy": loss / count}


@dataclass(frozen=True)
class Stages:
    """The models of one seed by stage: each call trains, or loads what was trained before."""

    task: Task
    steps: Steps
    device: torch.device
    sizes: Sizes

    def dense(self, hidden: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
        """The GELU model, for as many steps as the two stages of the others together."""
        total = self.sizes.dense + self.sizes.finetune
        recipe = Recipe(total, rate=2e-3, note=f"hidden {hidden}", seed=self.task.settings["split"])
        name = f"dense{hidden or ''}"
        model = trained(
            self.steps, name, self.task, recipe, lambda: self.task.model(hidden), self.device
        )
        return model, settings_of(self.task, recipe)

    def base(self) -> tuple[nn.Module, dict[str, Any]]:
        """The GELU model that fine-tuning starts from."""
        recipe = Recipe(self.sizes.dense, rate=2e-3, seed=self.task.settings["split"])
        make = lambda: self.task.model(None)  # noqa: E731
        model = trained(self.steps, "base", self.task, recipe, make, self.device)
        return model, settings_of(self.task, recipe)

    def finetuned(
        self, penalty: str | None, weight: float = 0.0, relu: bool = True, name: str = ""
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The base with ReLU, fine-tuned with a sparsity penalty or, for None, without."""
        base, settings = self.base()
        sparsity: dict[str, Any] = {}
        if penalty is not None:
            sparsity = {"penalty": penalty, "weight": weight, "schedule": "linear_warmup"}
        recipe = Recipe(
            self.sizes.finetune,
            rate=self.sizes.rate,
            sparsity=sparsity,
            seed=self.task.settings["split"] + 500,
            note=f"relu {relu}, from {lab.key_of(settings)}",
        )

        def make() -> nn.Module:
            model = copy.deepcopy(base)
            if relu:
                d2d.relufy(model, moved(self.task.calibration[0], self.device))
            return model

        stage = name or (f"relu-{penalty}-{weight:g}" if penalty else "relu")
        model = trained(self.steps, stage, self.task, recipe, make, self.device)
        return model, settings_of(self.task, recipe)

    def exits(self) -> tuple[lab.MultiExit, dict[str, Any]]:
        """The base with a classifier after every layer, fine-tuned on all of them."""
        base, settings = self.base()
        task = lab.exits_task(self.task)
        recipe = Recipe(
            self.sizes.finetune,
            rate=self.sizes.rate,
            seed=self.task.settings["split"] + 500,
            note=f"exits, from {lab.key_of(settings)}",
        )

        def make() -> lab.MultiExit:
            model = copy.deepcopy(base)
            return lab.MultiExit(model, "vit.layers", first_token, self.sizes.width, CLASSES)

        model = trained(self.steps, "exits", task, recipe, make, self.device)
        return model, settings_of(task, recipe)

    def projected(self, weight: float, epochs: int) -> tuple[nn.Module, dict[str, Any]]:
        """The base with ReLU and its attention projections replaced by blocks, fine-tuned with Hoyer.

        epochs: of the blocks' distillation.
        """
        base, settings = self.base()
        calibration = [moved(batch, self.device) for batch in self.task.calibration]
        recipe = Recipe(
            self.sizes.finetune,
            rate=self.sizes.rate,
            sparsity={"penalty": "hoyer", "weight": weight, "schedule": "linear_warmup"},
            seed=self.task.settings["split"] + 500,
            note=f"projections, {epochs} epochs, from {lab.key_of(settings)}",
        )

        def make() -> nn.Module:
            model = copy.deepcopy(base)
            d2d.relufy(model, calibration[0])
            d2d.replace_projections(model, calibration, epochs=epochs, progress=False)
            return model

        model = trained(self.steps, "projections", self.task, recipe, make, self.device)
        return model, settings_of(self.task, recipe)


def _data() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] of mean 0 and deviation 1, labels [1797]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    return images, torch.tensor(found.target, dtype=torch.int64)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images moved by -1, 0 or 1 pixels either way; what comes in is background."""
    padded = functional.pad(images, (1, 1, 1, 1), value=images.amin().item())
    moves = torch.randint(0, 3, (len(images), 2), generator=generator)
    moves[torch.rand(len(images), generator=generator) < 0.5] = 1
    rows = [image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, moves, strict=True)]
    return torch.stack(rows)
