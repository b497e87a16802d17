"""How long matching takes on graphs of 8, 32 and 128 layers; write benchmarks/results/matching.json.

    python benchmarks/matching.py

Tiny Llama, BERT and GPT-2 (random weights, width 32) are captured by Dynamo; matching finds all blocks and
projections of the graph. Best of five, one thread; the time that Dynamo took to trace is beside it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2dcompile import testing
from d2dcompile.passes import match_all, rules

RESULT = Path(__file__).parent / "results" / "matching.json"
LAYERS = (8, 32, 128)


def models() -> dict[str, Any]:
    """{family: function from a number of layers to a model}."""
    import transformers as t

    sizes = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    return {
        "llama": lambda n: t.LlamaModel(t.LlamaConfig(**sizes, num_hidden_layers=n)),
        "bert": lambda n: t.BertModel(t.BertConfig(**sizes, num_hidden_layers=n)),
        "gpt2": lambda n: t.GPT2Model(t.GPT2Config(vocab_size=99, n_embd=32, n_layer=n, n_head=4)),
    }


def measure(model: nn.Module) -> dict[str, Any]:
    """Nodes, sites, and seconds of tracing and of matching."""
    start = time.perf_counter()
    captured = testing.capture(model.eval(), torch.arange(12).view(1, 12))
    traced = time.perf_counter() - start
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        matches, misses = match_all(captured, *rules())
        best = min(best, time.perf_counter() - start)
    return {
        "nodes": len(captured.gm.graph.nodes),
        "blocks": sum(found.site.convertible for found in matches),
        "projections": sum(not found.site.convertible for found in matches),
        "misses": len(misses),
        "trace_s": round(traced, 3),
        "match_s": round(best, 4),
    }


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for family, make in models().items():
        for layers in LAYERS:
            found[f"{family}-{layers}"] = row = measure(make(layers))
            print(f"{family:>6} {layers:>4} layers: {row}", flush=True)
    RESULT.write_text(json.dumps({"torch": torch.__version__, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
