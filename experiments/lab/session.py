"""What every experiment's command line has, and where its files go.

    --quick     small sizes, one seed: what continuous integration runs
    --out DIR   folder of checkpoints and, with --quick, of results (out/experiments/<name>)
    --seeds N   how many seeds (three; one with --quick)
    --device D  where to run (a GPU if there is one)
    --fresh     forget the checkpoints first

Full results go to results/<name>.json and .png, quick ones to the folder.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import curves as reading
from . import plotting, results
from .methods import Point
from .steps import Steps

SEEDS = 3


@dataclass
class Session:
    """One run of an experiment.

    Attributes:
        quick: whether small sizes are wanted.
        device: where models run.
        seeds: 0, 1, ...
        out: folder of checkpoints.
        command: what makes the same results.
    """

    name: str
    quick: bool
    device: torch.device
    seeds: Sequence[int]
    out: Path
    command: str
    started: float = field(default_factory=time.perf_counter)

    def steps(self, seed: int) -> Steps:
        """Checkpoints of a seed."""
        return Steps(self.out / f"seed{seed}")

    def say(self, text: str) -> None:
        """A line of progress with the seconds since the start."""
        print(f"{time.perf_counter() - self.started:7.0f} s  {text}", flush=True)

    def folder(self) -> Path:
        """Where results go."""
        return self.out if self.quick else results.RESULTS

    def write(
        self,
        title: str,
        metrics: Mapping[str, bool],
        curves: Mapping[str, Sequence[Sequence[Point]]],
        dense: Sequence[Mapping[str, float]],
        notes: Mapping[str, Any],
        ours: str = "",
    ) -> Path:
        """Write <name>.json and <name>.png; the JSON's path.

        curves: {method: one curve per seed}; dense: the dense model's quality per seed; notes: whatever
        else was found (sizes, resolution, what was not run and why). ours: the method that all others are
        compared with, budget by budget.
        """
        path = self.folder() / f"{self.name}.json"
        summary = reading.summary(curves, dense, metrics)
        rivals = [method for method in curves if method != ours] if ours else []
        payload = {
            "title": title,
            "quick": self.quick,
            "metrics": dict(metrics),
            "dense": list(dense),
            "summary": summary,
            "ours": ours,
            "gaps": {
                metric: reading.gaps(summary, ours, rivals, metric, higher)
                for metric, higher in metrics.items()
            },
            "curves": {
                method: [[point.json() for point in run] for run in runs]
                for method, runs in curves.items()
            },
            "notes": dict(notes),
        }
        seconds = time.perf_counter() - self.started
        results.write(
            path,
            command=self.command,
            seeds=self.seeds,
            seconds=seconds,
            device=self.device,
            payload=payload,
        )
        plotting.draw(path.with_suffix(".png"), title, curves, dense, metrics)
        self.say(f"wrote {path}")
        return path


def session(
    name: str, about: str | None, argv: Sequence[str] | None = None, shared: str = ""
) -> Session:
    """Parse the command line of an experiment; `about` is its docstring.

    shared: the experiment whose folder of checkpoints it uses, if not its own.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--quick", action="store_true", help="small sizes, one seed")
    parser.add_argument("--out", type=Path, help="folder of checkpoints")
    parser.add_argument("--seeds", type=int, help=f"how many seeds ({SEEDS}; 1 with --quick)")
    parser.add_argument("--device", default=default, help=f"where to run ({default})")
    parser.add_argument("--fresh", action="store_true", help="forget the checkpoints first")
    given = parser.parse_args(sys.argv[1:] if argv is None else argv)
    quick = "-quick" if given.quick else ""
    out = given.out or results.ROOT / "out" / "experiments" / f"{shared or name}{quick}"
    if given.fresh:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    seeds = given.seeds if given.seeds is not None else (1 if given.quick else SEEDS)
    if seeds < 1:
        parser.error(f"--seeds is {seeds}; expected at least 1.")
    command = f"python -m experiments.{name}{' --quick' if given.quick else ''}"
    if given.seeds is not None:
        command += f" --seeds {given.seeds}"
    return Session(name, given.quick, torch.device(given.device), range(seeds), out, command)
