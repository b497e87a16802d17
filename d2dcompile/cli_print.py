"""What the command line prints: entries of the store, candidates compiled, times; as text or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from .gpu_candidates import text
from .gpu_schedules import GpuEntry
from .gpu_trial import Compiled
from .kernels.native import Spec
from .schedules import Entry
from .store import Keyed


def print_entries(entries: Sequence[Keyed], as_json: bool) -> None:
    """What tuning runs found, of both kinds of device."""
    if as_json:
        print(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    for entry in entries:
        if isinstance(entry, GpuEntry):
            _print_gpu(entry)
        elif isinstance(entry, Entry):
            _print_cpu(entry)


def _print_gpu(entry: GpuEntry) -> None:
    print(f"{entry.spec}: {entry.spec.activation}; {entry.device}, {entry.software}")
    print(
        f"  up to {entry.tokens} tokens and {entry.rows} rows an expert, {entry.union} % of experts used "
        f"(measured at {entry.share:.0%} executed): {text(entry.schedule)}"
    )
    listed = sorted(entry.times.items(), key=lambda item: item[1])
    print(f"  {entry.roofline:.0%} of the roofline; us: ", end="")
    print(", ".join(f"{name} {us:.1f}" for name, us in listed))


def print_compiled(done: Sequence[Compiled], as_json: bool) -> None:
    """What was compiled for an absent device, and what a tuning run would not time."""
    if as_json:
        print(json.dumps([asdict(compiled) for compiled in done], indent=1))
        return
    for found in done:
        print(
            f"{found.spec}, {found.load.tokens} tokens at {found.load.share:.0%}, {found.target}: "
            f"{len(found.good)} of {len(found.good) + len(found.refused)} candidates are good"
        )
        for name, reason in found.refused.items():
            print(f"  {name}: {reason}")


def _print_cpu(entry: Entry) -> None:
    chosen = entry.schedule
    print(f"{entry.spec}: {entry.spec.activation}; {entry.threads} threads, {entry.device}")
    print(f"  one token: {'the model' if chosen.decode else 'the packed copy'}'s weights")
    print(
        f"  fused up to {chosen.fused_rows} tokens; fetches {chosen.near} and {chosen.far} bytes ahead"
    )
    for rows, share in chosen.break_even:
        kept = "never" if share == 1 else f"above an executed share of {share:.2f}"
        print(f"  from {rows} tokens on everything runs {kept}")
    for tokens, times in entry.times.items():
        listed = ", ".join(f"{name} {us:.1f}" for name, us in times.items())
        print(f"  {tokens} tokens, us: {listed}")


def print_bench(spec: Spec, rows: Sequence[dict[str, Any]]) -> None:
    """Times of all candidates beside the dense block."""
    print(f"{spec}: {spec.activation}; {torch.get_num_threads()} threads; * the schedule that runs")
    print(f"{'tokens':>6} {'share':>6}  {'candidate':<16} {'us':>10} {'x dense':>8}")
    for n in dict.fromkeys(row["tokens"] for row in rows):
        here = [row for row in rows if row["tokens"] == n]
        dense = min(row["us"] for row in here if row["share"] is None)
        for row in sorted(here, key=lambda row: (row["share"] or 0, row["us"])):
            at = "" if row["share"] is None else f"{row['share']:.2f}"
            mark = "*" if row["chosen"] else " "
            noisy = " noisy" if row["noisy"] else ""
            print(
                f"{n:>6} {at:>6} {mark}{row['candidate']:<16} {row['us']:>10.1f} "
                f"{dense / row['us']:>8.2f}{noisy}"
            )
