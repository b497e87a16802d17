"""benchmarks/gpu.py --model."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu_cases
import gpu_model


def test_the_model_has_a_row_for_every_cell() -> None:
    cells = sum(len(case.cells) for case in gpu_cases.CASES)
    assert gpu_model.tables().count("\n| 4096x14336") == 2 * 11
    assert gpu_model.tables().count("\n| ") == 2 * (cells + 1)
