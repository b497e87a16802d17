"""Language models on the standard library's source: the task of lm.py (GPT-2) and gated.py (SwiGLU).

    python -m experiments.lm       python -m experiments.gated       see experiments/lab/session.py

One dense model is trained from scratch and shared by all seeds: what a seed varies is everything after it,
the order of the data in finetuning, the split, the routers. Per seed the dense model is finetuned as long
as the others, so that no method gains by more training:

    dense     as it is
    relu      its activations replaced by ReLU: the model of MoEfication
    sparse    ReLU and the square Hoyer penalty: D2DMoE's

and the same penalties without ReLU where the experiment asks for it. Quality is the mean cross-entropy of
next tokens on held-out files, in nats.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import d2dcompile as d2d

from . import lab
from .comparing import Comparison, Variant
from .text import Corpus, blocks, byte_pairs, standard_library


@dataclass(frozen=True)
class Sizes:
    """Sizes of model, data and training; the tokens of one step are batch * length."""

    vocabulary: int = 4096
    length: int = 256
    width: int = 320
    layers: int = 8
    heads: int = 5
    hidden: int = 1280
    batch: int = 16
    steps: int = 800
    finetune: int = 100
    calibration: int = 128
    validation: int = 8
    test: int = 64
    files: int | None = None
    expert_size: int = 8
    router_width: int = 64


QUICK = Sizes(
    vocabulary=512, length=64, width=64, layers=2, heads=2, hidden=256, batch=8, steps=30,
    finetune=10, calibration=8, validation=4, test=8, files=60, router_width=16,
)  # fmt: skip


DECISIVE = ("vocabulary", "length", "width", "layers", "heads", "hidden", "batch")  # of a model
MEASURED = ("calibration", "validation", "test")  # of its curves, too
HOYER = {"penalty": "hoyer", "weight": 0.5, "schedule": "linear_warmup"}


@cache
def corpus_of(files: int | None) -> Corpus:
    """The corpus, read once a process."""
    return standard_library(files)


@dataclass(frozen=True)
class Texts:
    """Token blocks [N, length] by split, and the tokenizer that made them."""

    tokenizer: Tokenizer
    splits: dict[str, Tensor]
    sha256: str

    @classmethod
    def of(cls, sizes: Sizes, folder: Path) -> Texts:
        """Blocks of the corpus; the tokenizer is trained once and kept in the folder."""
        corpus = corpus_of(sizes.files)
        path = folder / f"tokenizer-{corpus.sha256[:12]}-{sizes.vocabulary}.json"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            byte_pairs(corpus, sizes.vocabulary).save(str(path))
        tokenizer = Tokenizer.from_file(str(path))
        splits = {
            split: blocks(tokenizer, corpus, split, sizes.length)
            for split in ("train", "validation", "test")
        }
        return cls(tokenizer, splits, corpus.sha256)


def task_of(
    name: str, sizes: Sizes, texts: Texts, model: Callable[[int | None], nn.Module]
) -> lab.Task:
    """The task of one architecture."""
    flat = texts.splits["train"].flatten()
    starts = len(flat) - sizes.length

    def train(seed: int, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(starts, (sizes.batch,), generator=generator)
        ids = torch.stack([flat[i : i + sizes.length] for i in rows.tolist()])
        return {"input_ids": ids}

    def spread(split: str, count: int) -> list[dict[str, Tensor]]:
        """`count` blocks, evenly spread over the split, in batches."""
        found = texts.splits[split]
        index = torch.linspace(0, len(found) - 1, min(count, len(found))).long()
        return [{"input_ids": part} for part in found[index].split(sizes.batch)]

    return lab.Task(
        name=name,
        settings={name: vars(sizes)[name] for name in DECISIVE} | {"corpus": texts.sha256},
        model=model,
        train=train,
        calibration=spread("train", sizes.calibration),
        validation=spread("validation", sizes.validation),
        test=spread("test", sizes.test),
        loss=loss,
        quality=quality,
        metrics={"loss": False},
    )


def loss(model: Any, batch: lab.Batch) -> Tensor:
    """Mean cross-entropy of next tokens, [] nats."""
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def quality(model: Any, batches: Sequence[lab.Batch]) -> dict[str, float]:
    """{"loss": mean over the batches' tokens}."""
    losses = [(loss(model, batch).item(), batch["input_ids"].shape[0]) for batch in batches]
    return {"loss": sum(v * n for v, n in losses) / sum(n for _, n in losses)}


def base_recipe(sizes: Sizes) -> lab.Recipe:
    """Training from scratch."""
    return lab.Recipe(
        steps=sizes.steps, rate=1e-3, final=0.1, decay=0.1, betas=(0.9, 0.95), bf16=True, looks=8
    )


def finetune_recipe(sizes: Sizes, seed: int, base: str, **more: Any) -> lab.Recipe:
    """Finetuning of any variant; `base` says what it starts from."""
    recipe = lab.Recipe(
        steps=sizes.finetune, rate=5e-4, final=0.1, decay=0.1, betas=(0.9, 0.95), bf16=True,
        seed=seed + 1, looks=2, note=base,
    )  # fmt: skip
    return replace(recipe, **more)


def relu_copy(model: nn.Module, example: Any) -> nn.Module:
    """A copy with ReLU in its feed-forward blocks."""
    copied = copy.deepcopy(model)
    d2d.relufy(copied, example)
    return copied


def run(
    session: lab.Session,
    sizes: Sizes,
    make: Callable[..., nn.Module],
    title: str,
    sparsity: Mapping[str, Any],
    kept: Mapping[str, Any] | None,
) -> Path:
    """The whole experiment; the path of its JSON.

    make: (sizes, hidden) -> a fresh model. sparsity: the penalty of the sparse variant; kept: of a variant
    that keeps its activation function, for the first seed, or None.
    """
    texts = Texts.of(sizes, session.out)
    task = task_of(session.name, sizes, texts, lambda hidden: make(sizes, hidden))
    shared = lab.Steps(session.out / "shared")
    first = base_recipe(sizes)
    base = lab.trained(shared, "base", task, first, lambda: task.model(None), session.device)
    session.say(f"base: {quality(base, lab.on(session.device, task.test))}")
    origin = lab.key_of(lab.settings_of(task, first))
    curves: dict[str, list[list[lab.Point]]] = {}
    dense: list[dict[str, float]] = []
    for seed in session.seeds:
        trainer = Trainer(session, task, sizes, base, origin, seed)
        plain = trainer.variant("dense")
        sparse = trainer.variant("sparse", relu=True, sparsity=sparsity)
        relu = trainer.variant("relu", relu=True)
        still = trainer.variant("kept", sparsity=kept) if kept and seed == 0 else None
        dense.append(quality(plain.model, lab.on(session.device, task.test)))
        session.say(f"seed {seed}: dense {dense[-1]}")
        config = d2d.Config(
            expert_size=sizes.expert_size, router_width=sizes.router_width, seed=seed
        )
        comparison = Comparison(session, session.steps(seed), task, config)
        for method, points in comparison.curves(plain, relu, sparse, still).items():
            curves.setdefault(method, []).append(points)
    notes = {
        "corpus": texts.sha256,
        "parameters": sum(p.numel() for p in base.parameters()),
        "sizes": vars(sizes),
        "test_tokens": sum(batch["input_ids"].numel() for batch in task.test),
        "sparsity": dict(sparsity),
        "kept": dict(kept) if kept else None,
    }
    return session.write(title, task.metrics, curves, dense, notes, ours="D2DMoE")


@dataclass(frozen=True)
class Trainer:
    """Finetunes variants of the base model for one seed."""

    session: lab.Session
    task: lab.Task
    sizes: Sizes
    base: nn.Module
    origin: str
    seed: int

    def variant(
        self, name: str, relu: bool = False, sparsity: Mapping[str, Any] | None = None
    ) -> Variant:
        """The base model, with ReLU or not, finetuned with a penalty or without."""
        note = f"{self.origin} relu={relu}"
        recipe = finetune_recipe(self.sizes, self.seed, note, sparsity=sparsity or {})

        def start() -> nn.Module:
            if relu:
                return relu_copy(self.base, lab.on(self.session.device, self.task.calibration)[0])
            return copy.deepcopy(self.base)

        model = lab.trained(
            self.session.steps(self.seed), name, self.task, recipe, start, self.session.device
        )
        self.session.say(f"seed {self.seed}: {name} trained")
        measured = {key: vars(self.sizes)[key] for key in MEASURED}
        settings = {"variant": name, **measured, **lab.settings_of(self.task, recipe)}
        return Variant(model, settings)
