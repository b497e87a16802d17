"""Jobs for the tests of worker processes: one that works, and the ways in which one does not."""

import os
import signal
import subprocess
import time


def work(job: str) -> str:
    if job == "raise":
        raise ValueError("no such thing")
    if job == "crash":
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if job == "hang":
        subprocess.run(["sleep", "600"])
    if job == "leave":
        os._exit(3)
    return f"{job} {os.environ.get('TRITON_INTERPRET', 'compiles')}"


def slow(job: float) -> float:
    time.sleep(job)
    return job
