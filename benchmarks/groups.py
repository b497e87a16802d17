"""What the benchmarks of times share: groups that run in processes of their own, with threads pinned.

A group's figures are one JSON record. Finished groups stay in the result file and are not run again, as
long as machine and versions are the same.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class TimeLimit(Exception):
    """Something took longer than it may."""


def cores() -> list[int]:
    """One processor number for each core this process may run on: siblings share the arithmetic."""
    chosen: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        chosen.setdefault(path.read_text() if path.exists() else str(cpu), cpu)
    return list(chosen.values())


def threads() -> int:
    """Threads of a group's process: libgomp has bound the calling thread to one core by now."""
    return int(os.environ["OMP_NUM_THREADS"])


def header(command: str, packages: Sequence[str] = ("torch", "transformers")) -> Record:
    """The command, the versions and the machine that figures belong to."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line for line in lines if line.startswith("model name")), "")
    return {
        "command": command,
        "versions": {
            **{name: version(name) for name in packages},
            "python": platform.python_version(),
        },
        "machine": {
            "cpu": model.partition(": ")[2] or platform.processor(),
            "threads": len(cores()),
        },
    }


def load(path: Path, now: Record, fresh: bool) -> Record:
    """What is already measured; exits if that has another header than `now`."""
    if fresh or not path.exists():
        return {**now, "groups": {}, "broken": {}}
    found: Record = json.loads(path.read_text())
    for key in ("versions", "machine"):
        if found[key] != now[key]:
            sys.exit(f"{path} was measured with {found[key]}, this is {now[key]}: use --fresh")
    return found


def run_group(command: Sequence[str], path: Path, limit: float, bind: bool = True) -> Record:
    """The record that a Python command writes to `path`; {"broken": reason} if it died.

    command: arguments of the interpreter. limit: seconds, compiling included. bind: whether its
    threads, and with them the processes it starts, have a core each. Its output goes to a .log file
    beside `path`.
    """
    path.unlink(missing_ok=True)
    numbers = cores()
    bound = {
        "OMP_NUM_THREADS": str(len(numbers)),
        "GOMP_CPU_AFFINITY": " ".join(map(str, numbers)),
        "OMP_PROC_BIND": "true",
    }
    env = {**os.environ, **(bound if bind else {})}
    code: int | str
    with open(path.with_suffix(".log"), "w") as log:
        try:
            code = subprocess.run(
                [sys.executable, *command], env=env, stdout=log, stderr=log, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"took longer than {limit:.0f} s"
    if not path.exists():
        tail = path.with_suffix(".log").read_text().splitlines()[-1:]
        return {"broken": f"exit {code}: {' '.join(tail)}"}
    record: Record = json.loads(path.read_text())
    return record


def keep(found: Record, name: str, record: Record, path: Path, summary: str) -> None:
    """Enter a group's record into the results, print what became of it, and write the file."""
    found["broken"].pop(name, None)
    if "broken" in record:
        found["broken"][name] = summary = record["broken"]
    else:
        found["groups"][name] = record
    print(f"{name}: {summary}", flush=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def not_timed(found: Record) -> list[str]:
    """Lines of a report on candidates that failed, with the reasons; none if all were timed."""
    missing = [
        f"- {key}: {name}: {reason.splitlines()[0]}"
        for key, group in found["groups"].items()
        for name, reason in group["failed"].items()
    ]
    return ["", "Not timed:", "", *missing] if missing else []


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeLimit in the block when it takes longer; C++ code is interrupted when it returns."""

    def stop(*_: object) -> None:
        raise TimeLimit(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
