"""Balanced clustering: exact sizes, determinism, planted and brute-force optima, odd inputs."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from d2dcompile import cluster
from d2dcompile.cluster import Clusters, balanced_kmeans, permutation, random_split
from d2dcompile.errors import PlanError


def planted(experts: int, seats: int, width: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows [E F, d] around E random directions in random order, and the labels they came from."""
    generator = torch.Generator().manual_seed(seed)
    centres = functional.normalize(torch.randn(experts, width, generator=generator), dim=1)
    labels = torch.arange(experts * seats) % experts
    labels = labels[torch.randperm(len(labels), generator=generator)]
    jitter = torch.randn(len(labels), width, generator=generator) * noise / width**0.5
    return centres[labels] + jitter, labels


def same_partition(left: Tensor, right: Tensor) -> bool:
    """Whether two labellings agree up to the names of the experts."""
    pairs = set(zip(left.tolist(), right.tolist(), strict=True))
    return len(pairs) == len(set(left.tolist())) == len(set(right.tolist()))


def spread(features: Tensor, labels: Tensor) -> float:
    """The objective in fp64, from its definition."""
    rows = functional.normalize(features.double(), dim=1)
    groups = [rows[labels == e] for e in set(labels.tolist())]
    return sum(float((group - group.mean(0)).square().sum()) for group in groups)


def splits(left: tuple[int, ...], seats: int) -> Iterator[list[tuple[int, ...]]]:
    """Every way to cut `left` into groups of `seats`."""
    if not left:
        yield []
        return
    for rest in itertools.combinations(left[1:], seats - 1):
        group = (left[0], *rest)
        for tail in splits(tuple(i for i in left if i not in group), seats):
            yield [group, *tail]


def optimum(features: Tensor, experts: int) -> float:
    """The least objective over all balanced splits."""
    best = float("inf")
    for groups in splits(tuple(range(len(features))), len(features) // experts):
        labels = torch.empty(len(features), dtype=torch.int64)
        for expert, group in enumerate(groups):
            labels[list(group)] = expert
        best = min(best, spread(features, labels))
    return best


SIZES = [(1, 1), (7, 1), (7, 7), (8, 2), (9, 3), (12, 4), (12, 6), (96, 32), (130, 13), (256, 2)]
SIZES += [(384, 96), (200, 100), (1536, 48)]


@pytest.mark.parametrize("width", [1, 48])
@pytest.mark.parametrize(("neurons", "experts"), SIZES)
def test_every_expert_has_exactly_its_share(neurons: int, experts: int, width: int) -> None:
    found = balanced_kmeans(torch.randn(neurons, width), experts)
    assert isinstance(found, Clusters)
    assert found.labels.dtype == torch.int64
    assert found.labels.bincount(minlength=experts).tolist() == [neurons // experts] * experts


def test_objective_is_the_sum_of_squared_distances() -> None:
    features = torch.randn(240, 30)
    found = balanced_kmeans(features, 12)
    assert found.objective == pytest.approx(spread(features, found.labels), rel=1e-5)
    assert balanced_kmeans(features, 240).objective == 0.0


@pytest.mark.parametrize(("neurons", "experts"), [(240, 12), (240, 2), (512, 128)])
def test_same_seed_same_labels(neurons: int, experts: int) -> None:
    features = torch.randn(neurons, 40)
    first = balanced_kmeans(features, experts, seed=3)
    torch.manual_seed(99)  # the global generator must not matter
    again = balanced_kmeans(features.clone(), experts, seed=3)
    assert torch.equal(first.labels, again.labels)
    assert (first.objective, first.iterations) == (again.objective, again.iterations)
    assert not torch.equal(first.labels, balanced_kmeans(features, experts, seed=4).labels)


def test_small_inputs_do_not_depend_on_the_number_of_threads() -> None:
    features, threads = torch.randn(768, 192), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(balanced_kmeans(features, 48).labels)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("experts", "seats"), [(2, 64), (8, 48), (24, 16), (64, 8), (128, 3)])
def test_planted_clusters_are_recovered(experts: int, seats: int, seed: int) -> None:
    """Best of three seeds: about one run in fifty ends in a local optimum (measured, 480 runs)."""
    features, labels = planted(experts, seats, width=96, noise=0.5, seed=seed)
    runs = [balanced_kmeans(features, experts, seed=3 * seed + n) for n in range(3)]
    best = min(runs, key=lambda run: run.objective)
    assert same_partition(best.labels, labels)
    assert best.objective == pytest.approx(spread(features, labels), rel=1e-5)


def test_clustered_rows_beat_a_random_split_clearly() -> None:
    features, _ = planted(40, 12, width=64, noise=1.0, seed=0)  # not the number asked for
    found = balanced_kmeans(features, 24)
    assert found.objective < 0.8 * spread(features, random_split(480, 24))


@pytest.mark.parametrize(("neurons", "experts"), [(8, 2), (9, 3), (8, 4), (10, 2)])
def test_best_of_sixteen_seeds_matches_brute_force(neurons: int, experts: int) -> None:
    """A local search: one seed finds the optimum of unclustered toys in two of three draws."""
    for draw in range(4):
        features = torch.randn(neurons, 3, generator=torch.Generator().manual_seed(draw))
        found = [balanced_kmeans(features, experts, seed=seed).objective for seed in range(16)]
        assert optimum(features, experts) * (1 - 1e-5) <= min(found)
        assert min(found) <= optimum(features, experts) * 1.02


def test_more_iterations_never_raise_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SELF_SHARE", 1.2)  # so much that some passes do harm
    features = torch.randn(240, 30)
    found = [
        balanced_kmeans(features, 24, iterations=n, tolerance=-0.2).objective for n in range(1, 26)
    ]
    assert found == sorted(found, reverse=True)
    assert found[cluster.PASSES] < found[cluster.PASSES - 1] < found[0]


def test_a_smaller_tolerance_works_longer() -> None:
    features = torch.randn(480, 30)
    found = [balanced_kmeans(features, 24, tolerance=t) for t in (1e-1, 1e-3, 0.0)]
    assert found[0].objective > found[1].objective > found[2].objective
    assert found[0].iterations < found[1].iterations < found[2].iterations < 200


def test_swaps_gain_exactly_what_they_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    gains, real = [], cluster._candidates

    def record(*args: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        found = real(*args)
        gains.append(found[-1])
        assert len(torch.cat(found[:2])) == len(set(torch.cat(found[:2]).tolist()))
        return found

    monkeypatch.setattr(cluster, "_candidates", record)
    features = functional.normalize(planted(12, 20, width=16, noise=1.0, seed=0)[0], dim=1)
    start = random_split(240, 12)
    end = cluster._swap(features, start, 12, 0.0, lambda: True)
    assert end.bincount().tolist() == [20] * 12
    assert len(gains) > 20
    assert min(gains[:-1]) > 0
    assert sum(gains) == pytest.approx(spread(features, start) - spread(features, end), rel=1e-4)


@pytest.mark.parametrize(("small", "inside"), [(10**9, 1), (0, 2)])
def test_only_small_inputs_are_held_to_one_thread(
    monkeypatch: pytest.MonkeyPatch, small: int, inside: int
) -> None:
    monkeypatch.setattr(cluster, "SMALL", small)
    seen, threads = [], torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        features = torch.randn(48, 8)
        balanced_kmeans(features, 4, progress=lambda *_: seen.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {inside}


def test_scaling_a_row_changes_nothing() -> None:
    features = torch.randn(240, 30)
    powers = torch.tensor(2.0) ** torch.randint(-40, 40, (240, 1))  # exact in fp32
    left, right = balanced_kmeans(features, 12), balanced_kmeans(features * powers, 12)
    assert torch.equal(left.labels, right.labels)
    assert left.objective == right.objective


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    features, labels = planted(8, 12, width=48, noise=0.3, seed=1)
    scale = {torch.float64: 1e300}.get(dtype, 1.0)
    found = balanced_kmeans(features.to(dtype) * scale, 8)
    assert same_partition(found.labels, labels)


def test_tiny_rows_do_not_underflow() -> None:
    features, labels = planted(8, 12, width=48, noise=0.3, seed=1)
    assert same_partition(balanced_kmeans(features * 1e-37, 8).labels, labels)


def test_a_parameter_of_a_model_is_accepted() -> None:
    found = balanced_kmeans(torch.nn.Linear(16, 64).weight, 4)
    assert not found.labels.requires_grad


@pytest.mark.parametrize("zeros", [1, 100, 239, 240])
def test_zero_rows_stay_zero(zeros: int) -> None:
    features = torch.randn(240, 30)
    features[torch.randperm(240)[:zeros]] = 0
    found = balanced_kmeans(features, 12)
    assert found.labels.bincount(minlength=12).tolist() == [20] * 12
    assert found.objective == pytest.approx(spread(features, found.labels), rel=1e-5, abs=1e-6)


def test_equal_rows_are_split_evenly() -> None:
    found = balanced_kmeans(torch.ones(64, 5), 16)
    assert found.labels.bincount().tolist() == [4] * 16
    assert found.objective == pytest.approx(0, abs=1e-9)


def test_iterations_cap_and_progress() -> None:
    features, calls = torch.randn(480, 30), []
    found = balanced_kmeans(features, 24, progress=lambda *call: calls.append(call))
    assert calls == [(n + 1, 200) for n in range(found.iterations)]
    capped = balanced_kmeans(features, 24, iterations=2)
    assert capped.iterations == 2
    assert capped.objective > found.objective
    assert capped.labels.bincount().tolist() == [20] * 24


def test_random_split_is_balanced_and_seeded() -> None:
    labels = random_split(96, 8, seed=1)
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [12] * 8
    assert torch.equal(labels, random_split(96, 8, seed=1))
    assert not torch.equal(labels, random_split(96, 8, seed=2))


def test_permutation_sorts_by_expert_then_by_index() -> None:
    assert permutation(torch.tensor([1, 0, 2, 1, 0, 2])).tolist() == [1, 4, 0, 3, 2, 5]


@pytest.mark.parametrize("experts", [0, -3, 5, 13])
@pytest.mark.parametrize(
    "split", [random_split, lambda n, e: balanced_kmeans(torch.randn(n, 4), e)]
)
def test_experts_must_divide_the_neurons(split: Callable[[int, int], object], experts: int) -> None:
    with pytest.raises(PlanError, match=rf"{experts} experts .* 12 neurons .* Choose .*\[.*\d+\]"):
        split(12, experts)


@pytest.mark.parametrize(
    "features", [torch.randn(12), torch.randn(2, 3, 4), torch.ones(12, 4).int()]
)
def test_features_must_be_a_float_matrix(features: Tensor) -> None:
    with pytest.raises(PlanError, match="expected a float matrix"):
        balanced_kmeans(features, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_features_must_be_finite(bad: float) -> None:
    features = torch.randn(12, 4)
    features[5, 2] = features[9, 0] = bad
    with pytest.raises(PlanError, match=r"in 2 of 12 rows, first in row 5"):
        balanced_kmeans(features, 2)


def test_iterations_must_be_positive() -> None:
    with pytest.raises(PlanError, match="iterations is 0; expected at least 1"):
        balanced_kmeans(torch.randn(12, 4), 2, iterations=0)
