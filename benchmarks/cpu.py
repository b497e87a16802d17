"""The converted FFN on CPU against the best that others do; write benchmarks/results/cpu.json.

    python benchmarks/cpu.py [--quick] [--only PATTERN ...] [--without NAME ...] [--fresh] [--table]

Four shapes, T tokens, executed shares .05 to 1, fp32, bf16 and int8, weights cold, masks skewed as real
routing is. Rivals: eager, Inductor (default; frozen with max-autotune), prepacked oneDNN, the
grouped_mm experts of transformers; beside them the dense block of equal active width and the machine's
limits. Each group (shape, dtype, T) is one process with threads pinned, all candidates in turns;
finished groups are kept in the JSON and not run again. What gives a wrong answer is not timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import cpu_report
import groups
from cpu_cases import SHARES, Case, cases
from groups import Record

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out" / "cpu"
RESULT = ROOT / "benchmarks" / "results" / "cpu.json"
QUICK_SHARES = (0.1, 0.4)
GROUP_LIMIT = 3600  # seconds for one group, compiling included
COMMAND = "python benchmarks/cpu.py"


def run_group(case: Case, given: argparse.Namespace) -> Record:
    """Time one group in a process of its own; {"broken": reason} if it died."""
    command = [__file__, "--group", str(case), "--repeats", str(given.repeats)]
    command += ["--quick"] * given.quick + ["--without", *given.without]
    return groups.run_group(command, OUT / f"{case}.json", GROUP_LIMIT)


def work(given: argparse.Namespace) -> None:
    """Measure the group named on the command line, in this process."""
    from cpu_group import measure

    case = next(case for case in cases(given.quick) if str(case) == given.group)
    shares = QUICK_SHARES if given.quick else SHARES
    found = measure(case, shares, given.repeats, given.without, groups.threads())
    (OUT / f"{case}.json").write_text(json.dumps(found))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small groups, in out/cpu")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names: 768x3072, bf16-T1")
    parser.add_argument("--without", nargs="*", default=[], help="rivals left out: ideal, default")
    parser.add_argument("--fresh", action="store_true", help="forget finished groups")
    parser.add_argument(
        "--noisy", action="store_true", help="measure groups with noisy cells again"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--table", action="store_true", help="print the tables of the JSON and stop"
    )
    parser.add_argument("--group", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.without = [*given.without, "ideal", "default"]
        given.repeats = min(given.repeats, 3)
    return given


def main() -> None:
    given = arguments()
    OUT.mkdir(parents=True, exist_ok=True)
    if given.group:
        work(given)
        return
    result = OUT / "quick.json" if given.quick else RESULT
    if given.table:
        print(cpu_report.tables(json.loads(result.read_text())))
        return
    found = groups.load(result, groups.header(COMMAND), given.fresh)
    for case in cases(given.quick):
        name = str(case)
        if given.only and not any(f"{part}-" in f"{name}-" for part in given.only):
            continue
        done = found["groups"].get(name)
        noisy = done and any(cell["noisy"] for cell in done["cells"].values())
        if done and not (given.noisy and noisy):
            continue
        record = run_group(case, given)
        cells = record.get("cells", {}).items()
        speed = {share: round(cell["speedup"], 2) for share, cell in cells}
        summary = f"{record.get('seconds', 0):.0f} s, speed-up {speed}"
        groups.keep(found, name, record, result, summary)
    print(cpu_report.tables(found))
    if found["broken"]:
        sys.exit("some groups failed; run the command again to try them once more")


if __name__ == "__main__":
    main()
