"""The converted FFN on a GPU against the best that others do; write benchmarks/results/gpu.json.

    python benchmarks/gpu.py [--only PATTERN ...] [--without NAME ...] [--minutes 9] [--fresh] [--dry]

Route and experts of one layer under masks of a given executed share (and, for few tokens, a given union
of experts), weights cold, as replays of CUDA graphs. Rivals: cuBLAS and Inductor's max-autotune for the
dense layer, torch's grouped_mm and transformers' experts for the same masks; beside them the dense layer
of equal active width and the device's limits. First of all: does the path survive capture, and are its
bits the same every time? Each group (shape, dtype, T) is one process, all candidates in turns; finished
groups are kept in the JSON and not run again, so a run that reaches its minutes goes on where it stopped.
What gives a wrong answer is not timed. --dry runs all of it on toys in Triton's interpreter; --model
prints what the cost model expects.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import gpu_report
import groups
from groups import Record

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out" / "gpu"
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
GROUP_LIMIT = 150  # seconds for one group, compiling included
SHORTEST = 40  # seconds that must be left for another group to be started
RERUNS = 3  # times a group is run again without the candidate that broke the device
COMMAND = "python benchmarks/gpu.py"
CHECKS = "checks"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", default=[], help="parts of names: 768x3072, T1, checks"
    )
    parser.add_argument("--without", nargs="*", default=[], help="candidates left out: inductor")
    parser.add_argument("--minutes", type=float, default=9, help="after which no group is started")
    parser.add_argument("--fresh", action="store_true", help="forget finished groups")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--table", action="store_true", help="print the tables of the JSON and stop"
    )
    parser.add_argument(
        "--model", action="store_true", help="print the cost model's figures and stop"
    )
    parser.add_argument("--dry", action="store_true", help="toys in Triton's interpreter, no GPU")
    parser.add_argument("--result", type=Path, help="where the JSON is kept")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.result = given.result or (OUT / "dry.json" if given.dry else RESULT)
    return given


def names(dry: bool) -> list[str]:
    """Of all groups, in the order they are run."""
    from gpu_cases import CASES, TOYS

    return [CHECKS, *map(str, TOYS if dry else CASES)]


def work(given: argparse.Namespace) -> None:
    """Measure the group named on the command line, in this process, which then ends."""
    import gpu_checks
    import gpu_group
    import torch
    from gpu_cases import CASES, TOYS
    from gpu_device import Dry, Gpu, Lost

    if given.dry:
        torch.set_num_threads(1)  # a second thread makes tiny products slower
    else:
        import torch._inductor.async_compile  # its processes start by now
    last = [""]

    def note(name: str) -> None:
        last[:] = [name]
        _trying(given.record).write_text(name)

    place = Dry() if given.dry else Gpu()
    try:
        if given.group == CHECKS:
            record = gpu_checks.measure(place, note)
        else:
            case = next(case for case in (*CASES, *TOYS) if str(case) == given.group)
            record = gpu_group.measure(case, place, given.repeats, given.without, note)
    except Lost as error:
        record = {"broken": f"{last[0]}: {error}"}
    given.record.write_text(json.dumps(record))
    sys.stdout.flush()
    os._exit(0)  # a compiler that is still at work in a thread is not waited for


def _trying(path: Path) -> Path:
    """The file that names the candidate at work, for when the process does not live to say so."""
    return path.with_suffix(".trying")


def run_group(name: str, given: argparse.Namespace, until: float) -> Record:
    """Time one group in a process of its own, again without a candidate that broke the device or hung."""
    path, broken, without = OUT / f"{name}.json", {}, list(given.without)
    while True:
        _trying(path).unlink(missing_ok=True)
        command = [__file__, "--group", name, "--record", str(path)]
        command += ["--repeats", str(given.repeats)] + ["--dry"] * given.dry
        command += ["--without", *without]
        limit = max(SHORTEST, min(GROUP_LIMIT, until - time.time()))
        record = groups.run_group(command, path, limit, bind=False)
        if "broken" not in record:
            record["failed"].update(broken)
            return record
        trying = _trying(path)
        culprit = trying.read_text() if trying.exists() else ""
        late = until - time.time() < SHORTEST
        if culprit in ("", "compiling") or name == CHECKS or len(broken) == RERUNS or late:
            return record
        broken[culprit] = f"broke its process: {record['broken']}"
        without.append(culprit)


def main() -> None:
    start, given = time.time(), arguments()
    if given.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        os.environ["D2D_IMPL"] = "route:interpreter,expert_mlp:interpreter"
        given.repeats = 0
    OUT.mkdir(parents=True, exist_ok=True)
    if given.group:
        work(given)
        return
    if given.table:
        print(gpu_report.tables(json.loads(given.result.read_text())))
        return
    if given.model:
        import gpu_model

        print(gpu_model.tables())
        return
    import torch

    gpu = "none, Triton's interpreter" if given.dry else torch.cuda.get_device_name(0)
    now = groups.header(COMMAND, ("torch", "triton", "transformers"))
    now["machine"] = {"gpu": gpu}  # nothing of a graph runs on the processor
    found, until = groups.load(given.result, now, given.fresh), start + 60 * given.minutes
    for name in names(given.dry):
        wanted = not given.only or any(f"{part}-" in f"{name}-" for part in given.only)
        if not wanted or name in found["groups"]:
            continue
        if until - time.time() < SHORTEST:
            print("out of time: run the command again for the other groups", flush=True)
            break
        record = run_group(name, given, until)
        summary = f"{record.get('seconds', 0):.0f} s, {len(record.get('failed', {}))} not timed"
        groups.keep(found, name, record, given.result, summary)
    print(gpu_report.tables(found))
    if found["broken"]:
        sys.exit("some groups failed; run the command again to try them once more")


if __name__ == "__main__":
    main()
