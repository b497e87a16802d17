"""The standard library's source as a corpus: texts split by hash, a tokenizer made of them, batches.

No download and no licence to mind: every Python brings it. It differs between versions of Python, so
results name the SHA-256 of the corpus they were made with.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

HELD_OUT = 24  # of every so many files, by hash, one validates and one tests
SKIPPED = ("site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3")


@dataclass(frozen=True)
class Corpus:
    """Source files by split ("train", "validation", "test"), each (path in the library, text)."""

    files: dict[str, tuple[tuple[str, str], ...]]

    @cached_property
    def sha256(self) -> str:
        """Hash of all paths and texts: which corpus this is."""
        digest = hashlib.sha256()
        for split in sorted(self.files):
            for path, text in self.files[split]:
                digest.update(f"{split}\0{path}\0{text}\0".encode())
        return digest.hexdigest()

    def text(self, split: str) -> str:
        """All files of a split, one after another."""
        return "\n".join(text for _, text in self.files[split])


def standard_library(limit: int | None = None) -> Corpus:
    """The corpus of this Python's standard library, its tests left out.

    limit: keep about so many files only, evenly spread over each split, for quick runs. A file's split
    follows from the SHA-256 of its path, so that it is the same on every machine.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not set(path.relative_to(root).parts[:-1]) & set(SKIPPED)
    )
    files: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for path in _thinned(paths, limit):
        text = (root / path).read_text(encoding="utf-8", errors="replace")
        files[split_of(path)].append((path, text))
    return Corpus({split: tuple(found) for split, found in files.items()})


def _thinned(paths: list[str], limit: int | None) -> list[str]:
    """About `limit` of the paths, evenly spread over each split and at least two of each."""
    if limit is None:
        return paths
    kept: list[str] = []
    for split in ("train", "validation", "test"):
        own = [path for path in paths if split_of(path) == split]
        kept += own[:: max(1, len(own) // max(2, limit * len(own) // len(paths)))]
    return kept


def split_of(key: str) -> str:
    """Which split a key belongs to, by its SHA-256."""
    value = int(hashlib.sha256(key.encode()).hexdigest(), 16) % HELD_OUT
    return {0: "validation", 1: "test"}.get(value, "train")


def byte_pairs(corpus: Corpus, size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with `size` tokens, made of the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((text for _, text in corpus.files["train"]), trainer)
    return tokenizer


def blocks(tokenizer: Tokenizer, corpus: Corpus, split: str, length: int) -> Tensor:
    """A split's tokens, file after file, in blocks [N, length] int64; the last, short one is left out."""
    encoded = tokenizer.encode_batch([text for _, text in corpus.files[split]])
    tokens = torch.tensor([i for entry in encoded for i in entry.ids])
    return tokens[: len(tokens) // length * length].view(-1, length)


@dataclass(frozen=True)
class Fragment:
    """A function's source, without what it is called from: text and the index of its module."""

    text: str
    label: int


@dataclass(frozen=True)
class Fragments:
    """A classification task: which module does this fragment come from.

    Attributes:
        modules: names of the classes, top-level modules and packages.
        splits: fragments by split, each in the order of their hashes.
        sha256: hash of all of it.
    """

    modules: tuple[str, ...]
    splits: dict[str, tuple[Fragment, ...]]
    sha256: str


def fragments(classes: int = 24, most: int = 400, minimum: int = 120) -> Fragments:
    """Functions of the standard library's largest modules, each to be told where it is from.

    classes: the modules with the most functions. most: functions kept of each, those of the smallest
    hashes, so that classes are of similar size. minimum: characters that a function needs. Equal texts
    are kept once; a quarter of all tests, an eighth validates, by the hash of the text.
    """
    found: dict[str, dict[str, str]] = {}
    for split in standard_library().files.values():
        for path, text in split:
            module = path.split("/", 1)[0].removesuffix(".py")
            for source in _functions(text):
                key = hashlib.sha256(" ".join(source.split()).encode()).hexdigest()
                if len(source) >= minimum:
                    found.setdefault(module, {})[key] = source
    names = tuple(sorted(sorted(found, key=lambda name: (-len(found[name]), name))[:classes]))
    splits: dict[str, list[Fragment]] = {"train": [], "validation": [], "test": []}
    digest, taken = hashlib.sha256(), set()
    for label, name in enumerate(names):
        for key, source in sorted(found[name].items())[:most]:
            if key not in taken:  # of a function that stands in two modules, the first
                taken.add(key)
                split = {0: "test", 1: "test", 2: "validation"}.get(int(key[-6:], 16) % 8, "train")
                splits[split].append(Fragment(source, label))
                digest.update(f"{split}\0{name}\0{source}\0".encode())
    return Fragments(names, {k: tuple(v) for k, v in splits.items()}, digest.hexdigest())


def _functions(text: str) -> list[str]:
    """Source of every function and method of a file, dedented; none of a file this Python cannot parse.

    Functions inside a function come with that one alone: on their own, one could be tested on whose text
    the other was trained on.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own escape sequences
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines = text.splitlines()
    return [
        textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        for node in _outermost(tree)
    ]


def _outermost(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions below a node that stand in no other function, in the order of the source."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _outermost(child)
