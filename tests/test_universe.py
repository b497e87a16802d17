"""The universe of models with hand-written truth: all of what is small, and a sample of the rest.

`benchmarks/universe.py` runs all of it; its results are in benchmarks/results/universe.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from universe import Case, all_cases
from universe.equal import equality
from universe.score import score

CASES = {case.name: case for case in all_cases()}
SMALL = [case for case in CASES.values() if not case.name.startswith("hf/")]
HF = [case for case in CASES.values() if case.name.startswith("hf/")]
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "universe.json"
NORM_INSIDE = {  # a norm between the matrices: experts would need the values of all others
    "form/mlp_sub_norm",
    "hf/bitnet",
    "hf/kosmos-2.5",
}


NO_EXPERTS = {  # equal, but not run as experts throughout
    "hf/bloom": "its GELU is an autograd.Function, opaque in training",
    "hf/bloom-eager": "the same",
    "hf/ibert": "quantises through autograd.Functions",
    "hf/higgs_audio_v2": "no calibration token reaches its audio blocks",
}.keys()


def check(case: Case) -> None:
    found = score(case)
    assert not found.error, found.error
    assert not found.false
    if case.name in NORM_INSIDE:
        assert found.missed and all(
            "between the matrices" in t for t in found.missed if "down" in t
        )
        return
    assert not [text for text in found.missed if "the graph breaks" not in text]


@pytest.mark.parametrize("name", [case.name for case in SMALL])
def test_layers_forms_and_decoys_are_matched_as_the_truth_says(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("name", [case.name for case in HF[::27]])
def test_a_sample_of_transformers_is_matched_as_the_truth_says(name: str) -> None:
    check(CASES[name])


BLOCKS = [
    c for c in SMALL if c.name.startswith(("nn/encoder", "form/mlp", "form/glu", "form/fused"))
]
SOME = [c for c in HF[4::90] if c.name != "hf/zamba"]  # which takes a minute alone


@pytest.mark.parametrize("name", [case.name for case in [*BLOCKS[::6], *SOME]])
def test_a_sample_equals_dense_at_tau_zero_with_gradients(name: str) -> None:
    found = equality(CASES[name])
    assert found.sites or name in NORM_INSIDE or not CASES[name].truth(CASES[name].make()[0]).blocks
    assert not found.problems()


def test_the_recorded_run_of_the_whole_universe_meets_its_goals() -> None:
    """Counts are of the committed run; what it covered is the universe as it is."""
    run = json.loads(RESULTS.read_text())
    assert run["models"] == len(CASES) and run["errors"] == 0 and run["false"] == 0
    assert run["by_group"]["hf"] >= 200
    assert run["found_blocks"] >= 0.98 * run["visible_blocks"]
    assert run["found_projections"] >= 0.97 * run["visible_projections"]
    assert run["found_blocks"] >= 0.98 * run["blocks"]
    assert run["found_projections"] >= 0.97 * run["projections"]
    assert run["inductor_equal"] == run["inductor"] >= 40
    assert set(run["unequal"]) == NO_EXPERTS


def test_the_docs_quote_the_recorded_run() -> None:
    run = json.loads(RESULTS.read_text())
    text = " ".join((RESULTS.parents[2] / "docs" / "matching.md").read_text().split())
    for quote in (
        f"{run['models']} small models",
        f"{run['found_blocks']:,} of {run['blocks']:,} feed-forward blocks",
        f"{run['found_projections']:,} of {run['projections']:,} projections",
        f"{run['converted']} models have blocks that are converted ({run['sites']:,} sites)",
        f"{run['inductor_equal']} were compared under Inductor",
        f"{run['worst_eval_fp64']:.1e} in fp64",
        f"with gradients ({run['worst_grad_fp64']:.1e})",
    ):
        assert quote in text, quote
