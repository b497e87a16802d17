"""Each experiment in its quick form: every method has its curve, and the table can be made of them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
from experiments.lab import report  # noqa: E402
from experiments.text import fragments, split_of, standard_library  # noqa: E402

METHODS = {
    "digits": (
        "D2DMoE",
        "D2DMoE, a tau per site",
        "static top-k",
        "MoEfication",
        "early exit",
    ),
    "ablations": ("reference", "FFN and projections", "co-activation clustering", "static k"),
    "lm": ("D2DMoE", "D2DMoE, a tau per site", "static top-k", "MoEfication", "TEAL", "WINA"),
    "gated": ("D2DMoE", "D2DMoE, a tau per site", "static top-k", "MoEfication", "TEAL", "WINA"),
    "encoder": ("D2DMoE", "D2DMoE, a tau per site", "static top-k", "MoEfication", "TEAL", "WINA"),
    "sizes": ("experts of 64", "experts of 64, by co-activation"),
}
ON_MINILM, AS_A_COMMAND = ("encoder", "sizes"), "lm"


@pytest.mark.parametrize("name", [n for n in METHODS if n not in (*ON_MINILM, AS_A_COMMAND)])
def test_quick_form(name: str, tmp_path: Path) -> None:
    importlib.import_module(f"experiments.{name}").main(["--quick", "--out", str(tmp_path)])
    assert_complete(name, tmp_path)


@pytest.mark.minilm
def test_quick_form_on_minilm(tmp_path: Path) -> None:
    """The second takes the trained models of the first."""
    for name in ON_MINILM:
        importlib.import_module(f"experiments.{name}").main(["--quick", "--out", str(tmp_path)])
        assert_complete(name, tmp_path)


def test_quick_form_as_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{AS_A_COMMAND}", "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert_complete(AS_A_COMMAND, tmp_path)


def assert_complete(name: str, folder: Path) -> None:
    """Costs more than dense where everything runs, less than half where little does."""
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / f"{name}.json").read_text())
    assert result["command"].endswith(f"experiments.{name} --quick") and result["seeds"] == [0]
    curves, ours = result["curves"], result["ours"]
    assert set(result["summary"]) == set(curves) >= set(METHODS[name])
    costs = [point["cost"] for point in curves[ours][0]]
    assert max(costs) > 1 and min(costs) < 0.5
    assert f"| {ours} |" in report.table(result)


def test_a_file_belongs_to_one_split_whatever_else_there_is() -> None:
    """By the hash of its path, so that a corpus of fewer files never moves a test file into training."""
    whole, few = standard_library(), standard_library(40)
    paths = {split: {path for path, _ in files} for split, files in whole.files.items()}
    assert all(paths.values()) and sum(map(len, paths.values())) == len(
        set().union(*paths.values())
    )
    for split, files in few.files.items():
        assert files and {path for path, _ in files} <= paths[split]
        assert all(split_of(path) == split for path, _ in files)
    assert whole.sha256 == standard_library().sha256 != few.sha256


def test_no_fragment_stands_in_two_splits_or_under_two_modules() -> None:
    found = fragments(classes=6, most=60)
    texts = [fragment.text for split in found.splits.values() for fragment in split]
    assert len(found.modules) == 6 and len({" ".join(t.split()) for t in texts}) == len(texts)
    for split in found.splits.values():
        assert {fragment.label for fragment in split} == set(range(6))
