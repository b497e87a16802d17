"""Committed results of experiments are full runs, and the README's tables are made of them."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
from experiments.lab import report, results  # noqa: E402

FILES = sorted(results.RESULTS.glob("*.json"))


def test_the_readme_has_the_tables_of_the_results() -> None:
    assert report.main(["--check"]) == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_are_of_full_runs_with_their_plots(path: Path) -> None:
    found = results.read(path)
    assert not found["quick"] and "--quick" not in found["command"]
    assert path.with_suffix(".png").is_file()
    for runs in found["curves"].values():
        assert 1 <= len(runs) <= len(found["seeds"])
        assert all(0 < point["cost"] < 1.3 for run in runs for point in run)
