"""A Llama-style language model with gated (SwiGLU) blocks: the case that the paper's kernels cannot run.

    python -m experiments.gated           resumes where it was stopped
    python -m experiments.gated --quick   small sizes, one seed

6 M parameters, 6 layers of width 256, on the same text and with the same methods as lm.py; MoEfication's
targets are sums of |relu(gate) up|. ReLU takes the place of the gate's SiLU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from . import lab
from .architectures import llama
from .language import QUICK, Sizes, run

HOYER = {"penalty": "hoyer", "weight": 0.7, "schedule": "linear_warmup"}
FULL = Sizes(width=256, layers=6, heads=4, hidden=688, steps=400)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    session = lab.session("gated", __doc__, argv)
    sizes = replace(QUICK, hidden=192) if session.quick else FULL
    run(session, sizes, llama, "Llama-style language model (SwiGLU), 6 M parameters", HOYER, None)


if __name__ == "__main__":
    main(sys.argv[1:])
