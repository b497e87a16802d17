"""The main job on the real pretrained MiniLM: exact at tau = 0, and quality kept below it."""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import d2dcompile as d2d
from d2dcompile.attachment import states

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
minilm = pytest.importorskip("minilm", reason="examples/ is not beside the tests")

pytestmark = pytest.mark.minilm
PAIRS = 400


@dataclass
class Converted:
    """MiniLM converted on docstrings, its dense copy, and the evaluation texts as batches."""

    model: Any
    dense: Any
    fast: Any
    queries: list[Any]
    documents: list[Any]
    exact: tuple[torch.Tensor, torch.Tensor]

    def embed(self) -> tuple[torch.Tensor, torch.Tensor]:
        return minilm.embed(self.fast, self.queries), minilm.embed(self.fast, self.documents)

    def executed(self) -> float:
        return d2d.measure(self.model, self.queries[::3] + self.documents[::3]).executed


@pytest.fixture(scope="module")
def converted() -> Iterator[Converted]:
    model, tokenizer = minilm.load()
    dense = copy.deepcopy(model)
    texts = minilm.corpus(pairs=PAIRS)
    data = minilm.batches(texts.calibration[::9], tokenizer)
    d2d.convert(model, data, d2d.Config(router_epochs=10), progress=False)
    queries = minilm.batches(texts.queries, tokenizer)
    documents = minilm.batches(texts.documents, tokenizer)
    exact = minilm.embed(dense, queries), minilm.embed(dense, documents)
    fast = torch.compile(
        model, backend="d2dmoe", fullgraph=True, dynamic=True, options={"inner": "eager"}
    )
    yield Converted(model, dense, fast, queries, documents, exact)
    d2d.detach(model)


def test_all_six_blocks_are_converted(converted: Converted) -> None:
    names = [state.site.name for state in states(converted.model)]
    assert names == [f"encoder.layer.{i}" for i in range(6)]


def test_tau_zero_equals_dense(converted: Converted) -> None:
    d2d.set_tau(converted.model, 0.0)
    ours, exact = minilm.embed(converted.fast, converted.queries), converted.exact[0]
    assert (ours - exact).abs().max() < 1e-4


def test_executed_share_falls_with_tau(converted: Converted) -> None:
    shares = []
    for tau in (0.0, 0.1, 0.2, 0.4):
        d2d.set_tau(converted.model, tau)
        stats = d2d.measure(converted.model, converted.documents[:2])
        shares.append(stats.executed)
        pairs = sum(site.pairs for site in stats.sites.values())
        possible = sum(site.possible for site in stats.sites.values())
        # By hand: 48 experts of 2 * 384 * 32 multiply-adds per token, routers of 128 * (384 + 48).
        saved = (possible - pairs) * 2 * 384 * 32 - possible // 48 * 128 * (384 + 48)
        assert stats.macs == stats.dense_macs - saved
    assert shares[0] == 1.0
    assert all(later < earlier for earlier, later in pairwise(shares))


def test_quality_at_two_thirds_executed(converted: Converted) -> None:
    """Cosine to dense of at least 0.93 at 0.68 of the (token, expert) pairs, real routers."""
    d2d.fit_tau(converted.model, converted.documents[1::4], budget=0.66)
    ours = minilm.embed(converted.fast, converted.documents)
    assert converted.executed() <= 0.68
    assert minilm.cosine_to(converted.exact[1], ours) >= 0.93


def test_retrieval_at_half_executed(converted: Converted) -> None:
    """R@1 at most 0.03 below dense at half of the pairs; one standard error is about 0.025."""
    d2d.fit_tau(converted.model, converted.documents[1::4], budget=0.48)
    recall = minilm.recall_at_1(*converted.embed())
    assert converted.executed() <= 0.5
    assert recall >= minilm.recall_at_1(*converted.exact) - 0.03
