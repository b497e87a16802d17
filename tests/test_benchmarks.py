"""The arithmetic behind benchmarks/models.py: ceilings, predictions, masked references."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import d2dcompile as d2d
from d2dcompile.testing import Stack, forced_share

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import cpu_report
import models_cases
import models_group


def llama(**sizes: int) -> torch.nn.Module:
    import transformers

    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def test_ceilings_are_those_of_known_models() -> None:
    """Llama-2-7B is bound to 1.49, 1.97 and 2.44 times at shares of .5, .25 and .1, without a router."""
    model = llama(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    weights = models_cases.Weights.of(model, router_width=0)
    found = [round(weights.ceiling(share), 2) for share in (0.5, 0.25, 0.1)]
    assert found == [1.49, 1.97, 2.44]
    assert weights.ceiling(1.0) == 1.0


def test_weights_of_a_decode_step_are_the_models_own() -> None:
    """All parameters but the embedding and the norms are read once a token; a router adds its own."""
    model = llama(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    weights = models_cases.Weights.of(model, router_width=16)
    read = [p for name, p in model.named_parameters() if "norm" not in name and "embed" not in name]
    assert weights.dense == sum(p.numel() for p in read)
    assert weights.sparse(1.0) - weights.dense == 3 * (16 * 128 + 4 * 16)


def test_what_blocks_gain_is_attained_when_the_rest_stays() -> None:
    ms = {"compile": 100, "eager": 90, "d2dmoe": 40, "blocks compile": 70, "blocks d2dmoe": 10}
    record = {"layers": 7, "figures": {name: {"ms": value} for name, value in ms.items()}}
    found = models_group.compared(record)
    assert found["predicted_ms"] == pytest.approx(40)
    assert found["attained"] == pytest.approx(1)
    assert found["speedup"] == 2.5
    assert (found["best_dense"], found["speedup_best"]) == ("eager", 2.25)
    ms["d2dmoe frozen"] = 30
    record = {"layers": 7, "ceiling": 4.0, "figures": {k: {"ms": v} for k, v in ms.items()}}
    found = models_group.compared(record)
    assert (found["speedup"], found["speedup_best"]) == (2.5, 3.0)
    assert (found["of_ceiling"], found["of_ceiling_best"]) == (0.625, 0.75)


def test_masked_eager_is_the_block_with_its_forced_experts() -> None:
    """Against the backend, which runs the same masks; without masks the two are far apart."""
    model, x = Stack(depth=2, d=256, h=256), torch.randn(3, 8, 256)  # as small as kernels are built
    config = d2d.Config(expert_size=16, router_epochs=1)
    d2d.convert(model, [x], config, progress=False)
    run = torch.compile(model, backend="d2dmoe", options={"inner": "eager"})
    with torch.no_grad(), forced_share(model, 0.3, rows=24):
        exact, eager = models_group.truth(
            model, lambda m: m(x.to(m.blocks[0].up.weight.dtype)), torch.float64
        )
        ours = models_group.error(run(x), exact)
        assert ours <= 1e-6
        assert eager <= 1e-6
        assert models_group.error(model(x), exact) > 1e-3


@pytest.mark.parametrize("run", ["cpu", "cpu_amx"])
def test_the_page_of_cpu_times_has_the_tables_of_the_recorded_run(run: str) -> None:
    root = Path(__file__).parents[1]
    found = json.loads((root / "benchmarks" / "results" / f"{run}.json").read_text())
    text, page = cpu_report.tables(found), (root / "docs" / "cpu.md").read_text()
    assert text[text.index("| FFN |") :] in page
