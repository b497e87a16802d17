"""Match, convert and compare every model of the test universe; write benchmarks/results/universe.json.

    python benchmarks/universe.py [--jobs 2] [--inductor 40] [--only PATTERN ...] [--fresh]

For each case: what `explain` finds against the hand-written truth; then the conversion at tau = 0 against
dense, in eval and in training mode with gradients (inner backend eager), and for a sample under Inductor.
Resumable: finished cases are kept in out/universe/ and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
OUT = ROOT / "out" / "universe"
SLOW = {"hf/timesfm2_5"}  # dense Inductor alone does not finish it in 150 s
RESULT = ROOT / "benchmarks" / "results" / "universe.json"


def run(patterns: list[str], part: int, parts: int, inductor: int, rescore: bool) -> None:
    """Run every `parts`-th case of those not finished, one file per case."""
    import torch

    from universe import all_cases
    from universe.equal import equality
    from universe.score import score, select

    torch.set_num_threads(1)
    cases = select(all_cases(), patterns)
    with_blocks = [case for case in cases if case.name.startswith(("hf/", "form/", "nn/"))]
    sample = {case.name for case in with_blocks[:: max(1, len(with_blocks) // max(inductor, 1))]}
    sample -= SLOW
    for case in cases[part::parts]:
        path = OUT / f"{case.name.replace('/', '__')}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        before = set() if rescore else set(found)
        if "score" not in before:
            found["score"] = asdict(score(case))
        if "equal" not in found and found["score"]["blocks"]:
            equal = equality(case)
            found["equal"] = {**asdict(equal), "problems": equal.problems()}
        wanted = case.name in sample and found.get("equal", {}).get("sites")
        if wanted and "inductor" not in found:
            lowered = equality(case, "inductor")
            found["inductor"] = {**asdict(lowered), "problems": lowered.problems()}
        if set(found) == before:
            continue
        path.write_text(json.dumps(found))
        print(case.name, flush=True)


def summary(cases: dict[str, Any]) -> dict[str, Any]:
    """Totals over all cases; "visible" leaves out what Dynamo splits over graphs."""
    scores = [case["score"] for case in cases.values()]
    equal = {name: case["equal"] for name, case in cases.items() if case.get("equal")}
    lowered = {name: case["inductor"] for name, case in cases.items() if case.get("inductor")}
    total: dict[str, Any] = {
        key: sum(score[key] for score in scores)
        for key in ("blocks", "found_blocks", "projections", "found_projections")
    }
    for kind, word in (("blocks", "block "), ("projections", "")):
        split = sum(
            text.startswith("block ") == bool(word) and "the graph breaks" in text
            for score in scores
            for text in score["missed"]
        )
        total[f"visible_{kind}"] = total[kind] - split
    converted = {name: e for name, e in equal.items() if e["sites"]}
    wide = [e for e in converted.values() if e["dtype"] == "float64"]
    return {
        "models": len(cases),
        "by_group": dict(Counter(name.split("/")[0] for name in cases)),
        **total,
        "false": sum(len(score["false"]) for score in scores),
        "errors": sum(bool(score["error"]) for score in scores),
        "converted": len(converted),
        "sites": sum(e["sites"] for e in converted.values()),
        "dense_sites": sum(len(e["dense"]) for e in equal.values()),
        "equal": sum(not e["problems"] for e in converted.values()),
        "random_in_training": sorted(n for n, e in converted.items() if e.get("random")),
        "worst_eval_fp64": max((e["eval"] for e in wide), default=0),
        "worst_grad_fp64": max((e["grad"] for e in wide if not e.get("random")), default=0),
        "inductor": sum(e["sites"] > 0 for e in lowered.values()),
        "inductor_equal": sum(e["sites"] > 0 and not e["problems"] for e in lowered.values()),
        "missed": {n: c["score"]["missed"] for n, c in cases.items() if c["score"]["missed"]},
        "false_sites": {n: c["score"]["false"] for n, c in cases.items() if c["score"]["false"]},
        "unequal": {n: e["problems"] for n, e in equal.items() if e["problems"]},
        "inductor_unequal": {n: e["problems"] for n, e in lowered.items() if e["problems"]},
    }


def collect() -> dict[str, Any]:
    """The results of all finished cases, with the versions that made them."""
    import torch
    import transformers

    cases = {
        path.stem.replace("__", "/", 1): json.loads(path.read_text())
        for path in sorted(OUT.glob("*.json"))
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "command": "python benchmarks/universe.py",
        "versions": {**versions, "python": platform.python_version()},
        **summary(cases),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--inductor", type=int, default=56, help="cases compared under Inductor too"
    )
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--fresh", action="store_true", help="forget finished cases")
    parser.add_argument("--rescore", action="store_true", help="only match again, all cases")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if given.part is not None:
        run(given.only, given.part, given.jobs, given.inductor, given.rescore)
        return
    if given.fresh:
        for path in OUT.glob("*.json"):
            path.unlink()
    command = [sys.executable, __file__, *sys.argv[1:], "--part"]
    command = [word for word in command if word != "--fresh"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, str(i)], env=env, stderr=subprocess.DEVNULL)
        for i in range(given.jobs)
    ]
    if any(worker.wait() for worker in workers):
        sys.exit("a worker failed; run the command again to resume")
    found = collect()
    if not given.only:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    for key, value in found.items():
        if not isinstance(value, dict):
            print(f"{key}: {value}")


if __name__ == "__main__":
    main()
