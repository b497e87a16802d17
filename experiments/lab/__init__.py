"""What the experiments share: trained models in resumable steps, methods, curves, results, plots.

An experiment says what its task is, and runs methods over it:

    session = lab.session("digits", __doc__, argv)     # --quick --out --seeds --device --fresh
    for seed in session.seeds:
        task = make_task(seed)                         # lab.Task
        steps, device = session.steps(seed), session.device
        dense = lab.trained(steps, "dense", task, recipe, lambda: task.model(None), device)
        sparse = lab.trained(steps, "sparse", task, finetune, lambda: relu_copy(dense), device)
        key = lab.settings_of(task, finetune)          # names what the checkpoint depends on
        lab.converted(steps, "experts", key, task, sparse, config, device)
        curves["d2dmoe"].append(lab.dynamic(task, sparse, device, taus=lab.TAUS))
        curves["static"].append(lab.emulated(task, sparse, device, lab.static_topk(sparse)))
    session.write(title, task.metrics, curves, dense, notes, ours="d2dmoe")  # JSON and PNG

Names, all re-exported here:

- `Task` (task.py): model factory, batches, loss, quality and its direction.
- `Steps` (steps.py): `value`, `tensors`, `weights`, `folder_of`: named results on disk, keyed by a hash of
  their settings; `partial` for a training loop that resumes where it was stopped.
- `Recipe`, `train`, `trained` (training.py): AdamW, warm-up and cosine, clipping, order by seed and step.
- `Block`, `blocks_of`, `Rule`, `emulate` (emulation.py): forward hooks that mask a block's inputs or
  hidden values and count what a kernel that skips them would compute.
- Rules (baselines.py, moefication.py, teal.py): rivals of D2DMoE as masks.
- `MultiExit`, `exits_task`, `early_exit` (early_exit.py): a rival that skips layers.
- `Point`, `dynamic`, `emulated`, `converted`, `dense_point`, `narrower` (methods.py): curves.
- `summary`, `at_budget`, `critical`, `gaps` (curves.py); `draw` (plotting.py); `write`, `read` (results.py);
  `python -m experiments.lab.report` (report.py).

Costs are multiply-adds per token that a kernel executes, averaged over the test batches (padding counts
like any token), as a share of the dense ones: `Point.cost` of the converted blocks, routers included,
`Point.model_cost` of the whole model.
"""

from .baselines import SHARES, Oracle, StaticTopK, Threshold, Wina, oracle, static_topk, wina
from .curves import BUDGETS, at_budget, critical, gaps, mean_curve, summary
from .early_exit import MultiExit, early_exit, exits_task
from .emulation import Block, Rule, Tally, blocks_of, emulate
from .methods import (
    TAUS,
    Point,
    converted,
    dense_point,
    dynamic,
    emulated,
    narrower,
    on,
    per_site,
)
from .moefication import MoEfication, fit_moefication, moefication
from .results import ROOT
from .session import Session, session
from .steps import Steps, code, key_of
from .task import Batch, Task
from .teal import Teal, teal
from .training import History, Recipe, moved, settings_of, train, trained

__all__ = [
    "BUDGETS",
    "ROOT",
    "SHARES",
    "TAUS",
    "Batch",
    "Block",
    "History",
    "MoEfication",
    "MultiExit",
    "Oracle",
    "Point",
    "Recipe",
    "Rule",
    "Session",
    "StaticTopK",
    "Steps",
    "Tally",
    "Task",
    "Teal",
    "Threshold",
    "Wina",
    "at_budget",
    "blocks_of",
    "code",
    "converted",
    "critical",
    "dense_point",
    "dynamic",
    "early_exit",
    "emulate",
    "emulated",
    "exits_task",
    "fit_moefication",
    "gaps",
    "key_of",
    "mean_curve",
    "moefication",
    "moved",
    "narrower",
    "on",
    "oracle",
    "per_site",
    "session",
    "settings_of",
    "static_topk",
    "summary",
    "teal",
    "train",
    "trained",
    "wina",
]
