"""How large experts may be: the sparse encoder of encoder.py in experts of 4 to 256 neurons.

    python -m experiments.sizes --seeds 1   35 minutes on one core beside the encoder's checkpoints
    python -m experiments.sizes --quick     small sizes

Small experts are chosen more exactly; kernels want large ones: those of docs/cpu.md have 64. The
trained models are the encoder's: with its folder of checkpoints, --out, none is trained again. Quality and
cost are as there. Experts of 64 are also made of neurons that fire together, where those of the rest are of
neurons with similar weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from . import lab
from .comparing import Comparison
from .encoder import HOYER, QUICK, Sizes, Trainer, quality, task_of
from .text import fragments

SIZES = (4, 8, 16, 32, 64, 128, 256)
CLUSTERED = 64  # size at which both ways to split are compared
TAUS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    session = lab.session("sizes", __doc__, argv, shared="encoder")
    sizes = QUICK if session.quick else Sizes()
    task = task_of(sizes)
    trainer = Trainer(session, task, sizes)
    base = trainer.base()
    adapted = trainer.adapted(base)
    curves: dict[str, list[list[lab.Point]]] = {}
    dense = []
    for seed in session.seeds:
        plain = trainer.variant(seed, "dense", base)
        sparse = trainer.variant(seed, "sparse", adapted, sparsity=HOYER)
        dense.append(quality(plain.model, lab.on(session.device, task.test)))
        usual = trainer.config(seed)
        forms = {
            f"experts of {size}": replace(usual, expert_size=size)
            for size in ((CLUSTERED,) if session.quick else SIZES)
        }
        clustered = replace(usual, expert_size=CLUSTERED, clustering="coactivation")
        forms[f"experts of {CLUSTERED}, by co-activation"] = clustered
        for name, config in forms.items():
            compared = Comparison(
                session, session.steps(seed), task, config, thresholds=() if session.quick else TAUS
            )
            for method, points in compared.dynamic(name, sparse).items():
                curves.setdefault(method, []).append(points)
    notes = {"corpus": fragments(sizes.classes).sha256, "sizes": vars(sizes), "sparsity": HOYER}
    title = "MiniLM finetuned to tell a function's module: how large experts are"
    session.write(title, task.metrics, curves, dense, notes, ours=f"experts of {sizes.expert_size}")


if __name__ == "__main__":
    main(sys.argv[1:])
