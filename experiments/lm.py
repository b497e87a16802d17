"""A GPT-2-style language model on the standard library's source, with and without ReLU.

    python -m experiments.lm              resumes where it was stopped
    python -m experiments.lm --quick      small sizes, one seed

11 M parameters, 8 layers of width 320, trained from scratch on 3.1 M tokens of source text; the data,
the variants and what a seed means are in language.py. Methods, all on held-out files:

    D2DMoE (ReLU)         sparse: one tau for all sites, and one each
    D2DMoE (GELU)         GELU kept, pre-activations pushed down (the first seed only)
    D2DMoE, no penalty    experts of the model with ReLU alone
    static top-k          on the experts and routers of D2DMoE (ReLU)
    MoEfication           on the model with ReLU alone, as published, and on the sparse one
    oracle                true norms instead of the router: a bound, not a method
    TEAL, WINA            input channels skipped, of the dense model, without any training; of the sparse one

Of the first seed alone: "no penalty", the oracle, and rivals on the sparse model but for static top-k.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import lab
from .architectures import gpt2
from .language import HOYER, QUICK, Sizes, run

CLAMPED = {"penalty": "clamped_l1", "weight": 0.5, "schedule": "linear_warmup"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    session = lab.session("lm", __doc__, argv)
    sizes = QUICK if session.quick else Sizes()
    run(session, sizes, gpt2, "GPT-2-style language model, 11 M parameters", HOYER, CLAMPED)


if __name__ == "__main__":
    main(sys.argv[1:])
