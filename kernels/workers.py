"""Fresh Python processes that run jobs one after another; one that crashes or hangs costs only its job.

Compilers crash, and take the process with them. A worker is a new interpreter, not a fork, without the
environment variable that would make Triton interpret kernels instead of compiling them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

from tqdm.auto import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")

START = 300.0  # seconds to import this package, generously
INTERPRET = "TRITON_INTERPRET"


class Worker:
    """A process that answers `ask`; after a crash or a timeout it is gone."""

    def __init__(self) -> None:
        self.ours, theirs = Pipe()
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from {__name__} import serve; serve({theirs.fileno()})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            env={name: value for name, value in os.environ.items() if name != INTERPRET},
            stdin=subprocess.DEVNULL,
            stdout=self.said,
            stderr=self.said,
            start_new_session=True,  # so that its compilers end with it
        )
        theirs.close()
        self.alive = True
        self.started = False

    def ask(self, function: Callable[[Job], Result], job: Job, seconds: float) -> Result | str:
        """The function's result, or why there is none. function: importable by its name."""
        try:
            if not self.started:
                self._receive(START)
                self.started = True
            self.ours.send((function, job))
            done, value = self._receive(seconds)
        except TimeoutError:
            self.stop()
            return f"took longer than {seconds:g} seconds"
        except (EOFError, OSError):
            return self._ended()
        return cast(Result, value) if done else f"failed: {value}"

    def _receive(self, seconds: float) -> Any:
        if not self.ours.poll(seconds):
            raise TimeoutError
        return self.ours.recv()

    def _ended(self) -> str:
        code = self.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        self.stop()
        return f"ended its process with {how}: {' | '.join(lines[-3:])}"

    def stop(self) -> None:
        """End the process and everything it started."""
        if self.alive:
            self.alive = False
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.ours.close()
            self.said.close()


def serve(descriptor: int) -> None:
    """Answer jobs until the other side goes away; run in the worker."""
    pipe = Connection(descriptor)
    pipe.send(True)
    while True:
        try:
            function, job = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, function(job)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        pipe.send(answer)


def run(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    seconds: float = 120.0,
    label: str = "jobs",
    progress: bool = False,
) -> list[Result | str]:
    """The function's result for every job, in order; the reason as text for one that has none.

    function, jobs and results have to be picklable. workers: processes, as many as cores by default;
    seconds: for a job; label: of the progress bar.
    """
    count = min(len(jobs), workers or os.cpu_count() or 1)
    idle: SimpleQueue[Worker] = SimpleQueue()
    made: list[Worker] = []

    def one(job: Job) -> Result | str:
        try:
            worker = idle.get_nowait()
        except Empty:
            worker = Worker()
            made.append(worker)
        found = worker.ask(function, job, seconds)
        if worker.alive:
            idle.put(worker)
        return found

    if not jobs:
        return []
    pool = ThreadPoolExecutor(count)
    try:
        done = pool.map(one, jobs)
        return list(tqdm(done, label, len(jobs), disable=not progress, delay=0.5))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in made:
            worker.stop()
