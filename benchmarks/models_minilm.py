"""MiniLM at each tau of the demo: executed share and quality by examples/quickstart.py, and times."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from groups import Record
from models_group import Call, compiled, error, figure

import d2dcompile as d2d
from d2dcompile import timing
from d2dcompile.attachment import states

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import minilm
import quickstart

FLIPS = (
    0.01  # relative error allowed at tau > 0, where scores next to the threshold fall either way
)
ERROR = 2  # times the error of eager that ours may have at tau = 0
PLAIN = {"D2D_IMPL": "dynamic_mlp:reference"}  # the blocks in plain PyTorch
SIZES = {"taus": quickstart.TAUS, "pairs": 400, "texts": None, "epochs": 30}
QUICK = {"taus": (0.0, 0.25), "pairs": 40, "texts": 96, "epochs": 2}


def measure(quick: bool, repeats: int) -> Record:
    """A row for each tau: the demo's figures, the error, and times on the demo's batch."""
    start = time.time()
    size = QUICK if quick else SIZES
    model, tokenizer = minilm.load()
    dense, texts = copy.deepcopy(model), minilm.corpus()
    task = quickstart.Task(dense, tokenizer, texts, size["pairs"])
    data = minilm.batches(texts.calibration[::2][: size["texts"]], tokenizer)
    d2d.convert(model, data, d2d.Config(router_epochs=size["epochs"]), progress=False)
    rows = quickstart.sweep(model, task, size["taus"])
    batch = task.documents[-1]  # the longest texts
    with torch.no_grad():
        calls, reference = candidates(model, dense, batch)
        failed = check(model, dense, batch, calls, reference, rows)
        for row in rows:
            d2d.set_tau(model, row["tau"])
            kept = {
                name: call for name, call in calls.items() if f"{name} {row['tau']}" not in failed
            }
            row.update(times(kept, repeats))
            row["executed_timed"] = d2d.measure(model, [batch]).executed
    return {
        "shape": list(batch["input_ids"].shape),
        "dense_recall": minilm.recall_at_1(*task.exact),
        "taus": rows,
        "failed": failed,
        "seconds": time.time() - start,
    }


def candidates(model: Any, dense: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Call], Call]:
    """What is timed, and the converted model in plain PyTorch, which is not."""
    runs = {
        "d2dmoe": compiled(model, "d2dmoe"),
        "compile": compiled(copy.deepcopy(dense)),
        "eager": dense,
    }
    plain = compiled(model, "d2dmoe", inner="eager")
    given = dict(batch)

    def reference() -> Any:
        with mock.patch.dict(os.environ, PLAIN):
            return plain(**given).last_hidden_state

    calls = {
        name: lambda run=run: run(**given).last_hidden_state  # type: ignore[misc]
        for name, run in runs.items()
    }
    return calls, reference


def check(
    model: Any,
    dense: Any,
    batch: Mapping[str, Any],
    calls: Mapping[str, Call],
    reference: Call,
    rows: Sequence[Record],
) -> dict[str, str]:
    """Write the error at each tau into its row; {"d2dmoe <tau>": reason} of those that are wrong.

    At tau = 0 against the dense model in fp64, else against the converted model in plain PyTorch, there
    with tau = 0 in the blocks whose kernels skip nothing because nearly all experts are expected to run.
    """
    exact = copy.deepcopy(dense).double()(**batch).last_hidden_state
    allowed = ERROR * error(calls["eager"](), exact)
    tokens, failed = batch["input_ids"].numel(), {}
    for row in rows:
        d2d.set_tau(model, row["tau"])
        ours = calls["d2dmoe"]()
        whole = [s.site.name for s in states(model) if 0 < s.dense_rows <= tokens]
        if whole:
            d2d.set_tau(model, dict.fromkeys(whole, 0.0))
        truth, bound = (exact, allowed) if row["tau"] == 0 else (reference(), FLIPS)
        row["error"], row["whole_blocks"] = error(ours, truth), len(whole)
        if not row["error"] <= bound:
            failed[f"d2dmoe {row['tau']}"] = f"error {row['error']:.1e}, allowed are {bound:.1e}"
    return failed


def times(calls: Mapping[str, Call], repeats: int) -> Record:
    """Timings in turns, and ours against the others."""
    estimates = {name: timing.estimate(call) for name, call in calls.items()}
    with torch.compiler.set_stance("fail_on_recompile"):
        timings = timing.alternate(calls, estimates, repeats)
    found: Record = {"figures": {name: figure(taken) for name, taken in timings.items()}}
    ours = timings.get("d2dmoe")
    if ours is not None:
        for name in ("compile", "eager"):
            low, found[f"vs_{name}"], high = timing.speedup(timings[name], ours)
            found[f"vs_{name}_quartiles"] = (low, high)
    return found
