"""benchmarks/gpu.py without a GPU: every candidate and every code path on toys in Triton's interpreter."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.triton
if torch.cuda.is_available():
    pytest.skip("the benchmark itself runs on a GPU", allow_module_level=True)
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_group  # noqa: E402
import gpu_report  # noqa: E402
from gpu_cases import TOYS, Case, Cell  # noqa: E402
from gpu_device import Dry  # noqa: E402

RIVALS = {"eager", "merged", "inductor", "grouped_mm", "transformers"}
IDEAL = {"ideal eager", "ideal inductor"}
PAIRS = {"pairs", "pairs swap", "pairs tma", "pairs swap tma", "pairs 1 a SM"}
FEW = {"decode", "decode 16 splits", "decode 4 a SM"}
OURS = {f"ours {name}" for name in PAIRS | FEW | {"atomic", "atomic swap", "dense"}}


def test_one_token_has_all_candidates_and_none_is_refused() -> None:
    case = replace(TOYS[0], cells=TOYS[0].cells[:1])
    record = gpu_group.measure(case, Dry(), repeats=0)
    assert record["failed"] == {}
    (cell,) = record["cells"].values()
    assert set(cell["figures"]) == RIVALS | IDEAL | OURS
    assert {"route", "decode: up", "pairs: up, down, combine"} <= set(cell["phases_us"])
    assert cell["executed"] == 0.5
    checked = [row for name, row in cell["figures"].items() if name not in IDEAL]
    assert all(row["error"] < 1e-6 and row["same_bits"] for row in checked)


@pytest.mark.parametrize("case", TOYS[1:], ids=str)
def test_more_tokens(case: Case) -> None:
    """A forced union of experts; and tiles that need more tokens than there are decoded."""
    few = case.tokens == 8
    kept = {"ours pairs", "ours decode"} if few else {"ours pairs 64 rows"}
    record = gpu_group.measure(case, Dry(), repeats=0, without=OURS - kept - {"ours dense"})
    assert record["failed"] == {}
    (cell,) = record["cells"].values()
    rivals = RIVALS if few else RIVALS - {"merged"}
    assert set(cell["figures"]) == rivals | IDEAL | kept | {"ours dense"}
    if few:
        assert (cell["executed"], cell["union"]) == (0.25, 0.5)


def test_a_wrong_or_broken_candidate_is_named_and_ends_nothing(monkeypatch) -> None:
    def nothing(*_: object) -> None:
        raise RuntimeError("no rival here")

    monkeypatch.setattr(gpu_group.gpu_rivals, "flat", nothing)
    exact = gpu_group.gpu_rivals.gated
    monkeypatch.setattr(gpu_group.gpu_rivals, "gated", lambda *args: 1.01 * exact(*args))
    case = replace(TOYS[0], cells=TOYS[0].cells[:1])
    record = gpu_group.measure(case, Dry(), 0, OURS - {"ours decode"})
    assert record["failed"]["f0.5: grouped_mm"] == "RuntimeError: no rival here"
    assert "error 1.0e-02" in record["failed"]["eager"]
    assert {"merged", "ours decode"} <= set(record["cells"]["f0.5"]["figures"])


def test_checks_of_the_whole_path(monkeypatch) -> None:
    monkeypatch.setenv("D2D_IMPL", "route:interpreter,expert_mlp:interpreter")
    wanted = {"pairs", "decode"}
    every = gpu_checks.gpu_ours.schedules
    monkeypatch.setattr(
        gpu_checks.gpu_ours,
        "schedules",
        lambda *args: {name: s for name, s in every(*args).items() if name in wanted},
    )
    record = gpu_checks.measure(Dry())
    assert record["failed"] == {}
    assert set(record["checks"]) == {"T8 ops", "T8 beside", "T8 pairs", "T8 decode"}
    assert all(
        found["captured"] and found["right"] and found["same_bits"]
        for found in record["checks"].values()
    )


def test_finished_groups_are_kept_and_the_table_renders(monkeypatch, tmp_path, capsys) -> None:
    """One group in a process of its own, as a run does; the second run finds it done."""
    result = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    few = sorted(OURS - {"ours decode"})
    command = [
        "gpu.py",
        "--dry",
        "--only",
        f"{TOYS[1]}",
        "--result",
        str(result),
        "--without",
        *few,
    ]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("D2D_IMPL", "")
    gpu.main()
    first = capsys.readouterr().out
    assert f"{TOYS[1]}: " in first and "0 not timed" in first
    assert f"| {TOYS[1]} f0.25-u0.5 |" in first
    before = json.loads(result.read_text())
    gpu.main()
    assert "not timed" not in capsys.readouterr().out
    assert json.loads(result.read_text()) == before
    assert gpu_report.tables(before).count("\n| 32x64") == 3


def test_a_candidate_that_breaks_its_process_is_left_out_of_the_next(monkeypatch, tmp_path) -> None:
    calls: list[list[str]] = []

    def broken_once(command: list[str], path: Path, limit: float, bind: bool) -> dict[str, object]:
        calls.append(command[command.index("--without") + 1 :])
        if len(calls) > 1:
            return {"failed": {}}
        path.with_suffix(".trying").write_text("ours decode")
        return {"broken": "an illegal memory access"}

    monkeypatch.setattr(gpu, "OUT", tmp_path)
    monkeypatch.setattr(gpu.groups, "run_group", broken_once)
    given = Namespace(without=["inductor"], repeats=1, dry=True)
    record = gpu.run_group("name", given, until=time.time() + 600)
    assert calls == [["inductor"], ["inductor", "ours decode"]]
    assert record["failed"] == {"ours decode": "broke its process: an illegal memory access"}


def test_masks_have_the_shares_they_are_asked_for() -> None:
    case = next(c for c in gpu_cases.CASES if c.tokens == 64)
    for seed in range(3):
        mask = gpu_cases.union_mask(case, 0.1, 0.5, seed)
        assert float(mask.float().mean()) == pytest.approx(0.1, rel=0.01)
        assert int(mask.any(0).sum()) == 56
    many = next(c for c in gpu_cases.CASES if c.tokens > gpu_cases.MANY)
    first, second = gpu_cases.masks(many, Cell(0.25), 2)
    assert first.shape == (50432, 24) and not torch.equal(first, second)
    assert float(first.float().mean()) == pytest.approx(0.25, rel=0.01)
    assert float(second.float().mean()) == pytest.approx(0.25, rel=0.01)


def test_turns_on_the_same_weights_are_far_apart() -> None:
    """By three times the cache at least, whichever share of a layer a turn touches."""
    cache = 50 << 20
    for case in gpu_cases.CASES:
        copies = case.copies(cache)
        for cell in case.cells:
            touched = case.used(cell) * case.layer_bytes
            rows = 2 * case.tokens * case.width * case.torch_dtype.itemsize
            assert copies * (touched + rows) >= 3 * cache
        assert copies * case.layer_bytes < 4 << 30
