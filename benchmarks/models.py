"""Whole models, converted against dense; write benchmarks/results/models.json.

    python benchmarks/models.py [--quick] [--only PATTERN ...] [--fresh] [--repeats N] [--table]

BERT-base, ViT-B/16 and a decode step of a Llama of random weights (benchmarks/models_cases.py) at an
executed share of 20 %, masks skewed as real routing is: backend="d2dmoe" against torch.compile(model)
and eager, both compilers also with freezing and max-autotune; beside them what the gain of the blocks
alone predicts for the model. MiniLM (pretrained, as in examples/quickstart.py) at each of the demo's
taus, with its quality. Each model is one process with threads pinned, all candidates in turns; finished
ones are kept in the JSON and not run again. What gives a wrong answer is not timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import groups
import models_report
from groups import Record
from models_cases import cases

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out" / "models"
RESULT = ROOT / "benchmarks" / "results" / "models.json"
COMMAND = "python benchmarks/models.py"
GROUP_LIMIT = 3600  # seconds for one model, compiling included
MINILM = "minilm-fp32"


def measured(given: argparse.Namespace) -> Record:
    """The figures of the model named on the command line, taken in this process."""
    if given.group == MINILM:
        import models_minilm

        return models_minilm.measure(given.quick, given.repeats)
    from models_group import measure

    case = next(case for case in cases(given.quick) if str(case) == given.group)
    return measure(case, given.repeats, groups.threads())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two layers a model, in out/models")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names: bert, vit-fp32")
    parser.add_argument("--fresh", action="store_true", help="forget finished models")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.repeats = min(given.repeats, 2)
    return given


def main() -> None:
    given = arguments()
    OUT.mkdir(parents=True, exist_ok=True)
    if given.group:
        (OUT / f"{given.group}.json").write_text(json.dumps(measured(given)))
        return
    result = OUT / "quick.json" if given.quick else RESULT
    if given.table:
        print(models_report.tables(json.loads(result.read_text())))
        return
    found = groups.load(result, groups.header(COMMAND), given.fresh)
    for name in (*map(str, cases(given.quick)), MINILM):
        if given.only and not any(part in name for part in given.only):
            continue
        if name in found["groups"]:
            continue
        command = [__file__, "--group", name, "--repeats", str(given.repeats)]
        record = groups.run_group(
            command + ["--quick"] * given.quick, OUT / f"{name}.json", GROUP_LIMIT
        )
        groups.keep(found, name, record, result, f"{record.get('seconds', 0):.0f} s")
    print(models_report.tables(found))
    if found["broken"]:
        sys.exit("some models failed; run the command again to try them once more")


if __name__ == "__main__":
    main()
