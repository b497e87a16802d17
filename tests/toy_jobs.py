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


def finetune_apart(rank: int, folder: str) -> None:
    """Two steps of a distributed fine-tuning on a rank's own data; writes what its routers are then."""
    import torch

    import d2dcompile as d2d
    from d2dcompile import testing

    torch.manual_seed(0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        model = testing.Stack(depth=1)
        config = d2d.Config(expert_size=16, router_width=8, router_epochs=1)
        conversion = d2d.convert(model, [torch.randn(256, 16)], config, progress=False)
        d2d.set_tau(model, 0.3)
        with d2d.finetune(model, conversion) as tuning:
            fast = torch.compile(model, backend="d2dmoe", options={"inner": "eager"})
            wrapped = torch.nn.parallel.DistributedDataParallel(fast)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            torch.manual_seed(rank)
            for _ in range(2):
                wrapped(torch.randn(64, 16)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            ((first, second),) = tuning.routers.values()
            torch.save([first.detach(), second.detach()], f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
