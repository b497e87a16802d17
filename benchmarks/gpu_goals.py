"""What the cost model says of the GPU kernels, beside the goals; nothing here is measured.

    python benchmarks/gpu_goals.py [--gpu H200]

Times faster than the dense block by the closed-form schedule and by the best candidate, routing included,
and how many candidates a quick tuning run would compile. A model: to be replaced by benchmarks/gpu.py.
"""

from __future__ import annotations

import argparse

from d2dcompile import cost
from d2dcompile.gpu_blocks import GpuSpec
from d2dcompile.gpu_candidates import modelled, ranked, text
from d2dcompile.gpu_defaults import default
from d2dcompile.gpus import GPUS, Gpu
from d2dcompile.load import Load

LLAMA = GpuSpec(4096, 4096, 112, 128, True, "silu(gate) * up")
VIT = GpuSpec(768, 768, 24, 128, False, "gelu(up)")
VIT_FP32 = GpuSpec(768, 768, 24, 128, False, "gelu(up)", dtype="fp32")
GOALS = (  # block, tokens, executed share, union (None: independent routing), goal
    (LLAMA, 1, 0.10, None, 6.0),
    (LLAMA, 1, 0.25, None, 3.2),
    (LLAMA, 1, 0.50, None, 1.8),
    (LLAMA, 8, 0.10, 0.20, 3.5),
    (LLAMA, 64, 0.10, 0.20, 3.5),
    (LLAMA, 64, 0.10, None, 0.97),
    (LLAMA, 4096, 0.10, None, 4.0),
    (LLAMA, 4096, 0.25, None, 1.9),
    (VIT, 50432, 0.10, None, 2.8),
    (VIT, 50432, 0.25, None, 1.5),
    (VIT_FP32, 50432, 0.25, None, 3.0),
)


def row(gpu: Gpu, spec: GpuSpec, load: Load, goal: float) -> str:
    """One line of the table."""
    block = spec.block()
    dense, router = cost.dense_time(gpu, block, load.tokens), cost.router_time(gpu, block, load)

    def faster(seconds: float, strategy: str) -> float:
        return dense / (seconds + (0.0 if strategy == "dense" else router))

    own = default(spec, load, gpu)
    candidates = ranked(spec, load, gpu, 32)
    best = max(candidates, key=lambda s: faster(modelled(spec, load, gpu, s), s.strategy))
    speeds = [faster(modelled(spec, load, gpu, s), s.strategy) for s in (own, best)]
    return (
        f"| {spec} | {load.tokens} | {load.share:.0%} | {load.used:.0%} | {goal:g}x | "
        f"{speeds[0]:.2f}x | {speeds[1]:.2f}x | {text(own)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    gpu = GPUS[parser.parse_args().gpu]
    print(f"Modelled for {gpu.name}, not measured.\n")
    print(
        "| block | tokens | executed | used | goal | default | best candidate | default schedule |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for spec, tokens, share, union, goal in GOALS:
        print(row(gpu, spec, Load(tokens, share, union), goal))


if __name__ == "__main__":
    main()
