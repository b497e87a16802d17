"""The router: exact targets by the Gram identity, a fit that finds planted experts, and its laws."""

import pytest
import torch
from torch.nn.functional import normalize

from d2dcompile.errors import CalibrationError
from d2dcompile.router import CHUNK, LEVEL, Router, expert_norms, fit_router, gram

D, E = 24, 12


def explicit(hidden, w_down):
    """The meaning, in fp64: every expert's output, then its norm."""
    return torch.einsum("tef,efd->ted", hidden.double(), w_down.double()).norm(dim=-1)


@pytest.fixture(scope="module")
def planted():
    """Tokens of a few topics, each topic waking a few experts in proportion to its strength."""
    g = torch.Generator().manual_seed(1)
    topics = normalize(torch.randn(6, D, generator=g), dim=-1)
    owners = torch.rand(6, E, generator=g).square()
    strength = torch.rand(6000, 6, generator=g) * (torch.rand(6000, 6, generator=g) < 0.4)
    main = torch.randint(6, (6000, 1), generator=g)
    strength.scatter_add_(1, main, 0.5 + torch.rand(6000, 1, generator=g))
    x = strength @ topics + 0.01 * torch.randn(6000, D, generator=g)
    return x, strength @ owners


@pytest.fixture(scope="module")
def router(planted):
    return fit_router(*planted, width=32, epochs=20)


def chosen(scores, tau):
    return ~(scores < tau * scores.amax(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("tokens", "experts", "size"), [(1, 1, 1), (37, 5, 8), (64, 3, 16)])
def test_gram_norms_are_the_norms_of_the_outputs(dtype, tokens, experts, size):
    hidden = torch.randn(tokens, experts, size).to(dtype)
    w_down = torch.randn(experts, size, D).to(dtype)
    norms = expert_norms(hidden, gram(w_down))
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), explicit(hidden, w_down), rtol=1e-5, atol=1e-5)


def test_norms_of_a_silent_or_cancelling_expert_are_zero_not_nan():
    row = torch.randn(1, 1, D)
    w_down = torch.cat([row, -row], dim=1)
    hidden = torch.tensor([[[3.0, 3.0]], [[0.0, 0.0]], [[1e-20, 1.0]]])
    norms = expert_norms(hidden, gram(w_down))
    assert norms[:2].abs().max() < 1e-2
    assert norms.isfinite().all()


def test_norms_in_chunks_equal_norms_at_once(monkeypatch):
    hidden, matrices = torch.randn(50, 4, 6), gram(torch.randn(4, 6, D))
    whole = expert_norms(hidden, matrices)
    monkeypatch.setattr("d2dcompile.router.CHUNK", 7 * 4 * 6)
    torch.testing.assert_close(expert_norms(hidden, matrices), whole, rtol=1e-6, atol=1e-6)
    assert CHUNK >= 1 << 20


def test_norms_of_no_token_are_empty():
    assert expert_norms(torch.empty(0, 3, 4), gram(torch.randn(3, 4, D))).shape == (0, 3)


def test_shapes_that_disagree_are_named():
    with pytest.raises(CalibrationError, match=r"\[2, 3, 4\].*\[3, 5, 5\]"):
        expert_norms(torch.randn(2, 3, 4), torch.randn(3, 5, 5))
    with pytest.raises(CalibrationError, match=r"\[3, 4\].*\[E, F, D\]"):
        gram(torch.randn(3, 4))


def test_finds_planted_experts(planted, router):
    x, targets = planted
    for tau in (0.1, 0.2, 0.3, 0.5):
        exact = chosen(targets ** router.stats["exponent"], tau)
        found = chosen(router(x), tau)
        assert (found & exact).sum() / (found | exact).sum() > 0.9
        assert router.stats[f"iou@{tau}"] > 0.9
        assert router.stats[f"recall@{tau}"] > 0.95
    assert router.stats["r2"] > 0.85


def test_the_fit_beats_the_best_constant_ranking(planted, router):
    x, targets = planted
    exact = chosen(targets ** router.stats["exponent"], 0.3)
    constant = chosen((targets ** router.stats["exponent"]).mean(0).expand_as(targets), 0.3)
    assert (chosen(router(x), 0.3) ^ exact).sum() < (constant ^ exact).sum() / 3


def test_level_moves_the_median_and_none_predicts_the_norms(planted, router):
    x, targets = planted
    tempered = targets ** router.stats["exponent"]
    assert (tempered / tempered.amax(1, keepdim=True)).median().item() == pytest.approx(
        LEVEL, abs=0.01
    )
    plain = fit_router(x, targets, width=32, epochs=20, level=None)
    assert plain.stats["exponent"] == 1
    assert (plain(x) - targets).abs().mean() < 0.05 * targets.mean()


def test_the_scale_of_tokens_and_features_does_not_matter(planted):
    x, targets = planted
    x, targets = x[:2000], targets[:2000]
    stretch = torch.logspace(-3, 3, D)
    router = fit_router(x * stretch, targets * 1e-4, width=32, epochs=20)
    assert router.stats["iou@0.3"] > 0.85
    assert router(x * stretch).mean() == pytest.approx(
        (targets * 1e-4).pow(router.stats["exponent"]).mean().item(), rel=0.1
    )


def test_scores_are_never_negative_and_keep_leading_dimensions(router):
    scores = router(torch.randn(2, 5, D) * 100)
    assert scores.shape == (2, 5, E)
    assert scores.dtype == torch.float32
    assert (scores >= 0).all()


def test_weights_are_two_plain_fp32_matrices(router):
    assert router.w1.shape == (32, D)
    assert router.w2.shape == (E, 32)
    for weight in (router.w1, router.w2):
        assert weight.dtype == torch.float32
        assert weight.is_contiguous()
        assert not weight.requires_grad
        assert weight.isfinite().all()
    x = torch.randn(3, D)
    assert torch.equal(router(x), ((x @ router.w1.T).relu() @ router.w2.T).abs())
    assert all(isinstance(value, float) for value in router.stats.values())


def test_a_seed_gives_one_router_and_leaves_the_global_state_alone(planted):
    x, targets = planted[0][:500], planted[1][:500]
    before = torch.get_rng_state()
    first = fit_router(x, targets, width=8, epochs=2, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again = fit_router(x, targets, width=8, epochs=2, seed=3)
    other = fit_router(x, targets, width=8, epochs=2, seed=4)
    assert torch.equal(first.w1, again.w1)
    assert torch.equal(first.w2, again.w2)
    assert first.stats == again.stats
    assert not torch.equal(first.w1, other.w1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fits_where_gradients_are_off_even_on_inference_tensors(planted, mode):
    with mode():
        x, targets = planted[0][:500] + 0, planted[1][:500] + 0
        router = fit_router(x, targets, width=8, epochs=2)
        router(x)
    assert not router.w1.is_inference()


def test_arguments_are_left_as_they_were(planted):
    x, targets = planted[0][:200].clone(), planted[1][:200].clone()
    fit_router(x, targets, width=4, epochs=1, level=None)
    assert torch.equal(x, planted[0][:200])
    assert torch.equal(targets, planted[1][:200])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_fit_too(planted, dtype):
    x, targets = planted
    router = fit_router(x[:3000].to(dtype), targets[:3000].to(dtype), width=32, epochs=15)
    assert router.stats["iou@0.3"] > 0.85
    assert router(x[:3].to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 300])
def test_few_tokens_are_enough_to_run(tokens):
    router = fit_router(torch.randn(tokens, D), torch.rand(tokens, E), width=4, epochs=2)
    assert all(torch.tensor(value).isfinite() for value in router.stats.values())


@pytest.mark.parametrize(
    "targets",
    [torch.zeros(64, E), torch.ones(64, E), torch.rand(64, 1), torch.rand(64, E) * (torch.rand(64, E) < 0.1)],
    ids=["silent", "equal", "one expert", "sparse"],
)  # fmt: skip
def test_degenerate_targets_give_finite_routers(targets):
    router = fit_router(torch.randn(64, D), targets, width=4, epochs=2)
    assert router(torch.randn(5, D)).isfinite().all()
    assert 0.5 <= router.stats["exponent"] <= 2


def test_a_dead_feature_gets_no_unbounded_weight(planted):
    x = planted[0][:1000].clone()
    x[:, 3] = 0
    router = fit_router(x, planted[1][:1000], width=16, epochs=5)
    assert router.w1.isfinite().all()
    assert router.stats["iou@0.3"] > 0.6


@pytest.mark.parametrize("seed", range(3))
def test_tokens_that_no_expert_adds_anything_to_leave_the_router_alive(seed):
    """A sixth of the tokens are such; scores of zero would run every expert, for others as well."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4000, 16, generator=generator)
    targets = (x @ torch.randn(16, 12, generator=generator)).relu()
    targets[x[:, 0] > 1] = 0
    router = fit_router(x, targets, width=8, seed=seed, epochs=10)
    scores = router(x)
    most = scores.amax(1, keepdim=True)
    assert (most == 0).float().mean() < 0.005
    assert (scores >= 0.3 * most).float().mean() < 0.55
    assert router.stats["pearson"] > 0.55


@pytest.mark.parametrize("seed", range(3))
def test_sparse_targets_of_mostly_silent_tokens_give_no_scores_of_zero(seed):
    """Most tokens want nothing, the others few experts, which can only be guessed: no reason to run all."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4000, 16, generator=generator)
    targets = (x @ torch.randn(16, 24, generator=generator) - 2).relu()
    targets *= torch.rand(targets.shape, generator=generator) < 0.5
    targets[x[:, 0] < 0.5] = 0
    silent = targets.amax(1) == 0
    router = fit_router(x, targets, width=16, seed=seed, epochs=10)
    scores = router(x)
    most = scores.amax(1, keepdim=True)
    chosen = scores >= 0.3 * most
    assert silent.float().mean() > 0.6
    assert (most == 0).float().mean() < 0.002
    assert chosen[silent].float().mean() < 0.15
    assert chosen.float().mean() < 0.2
    wanted = targets >= 0.3 * targets.amax(1, keepdim=True)
    wanted &= ~silent[:, None]
    assert (chosen & wanted).sum() > 0.6 * wanted.sum()


def test_progress_counts_epochs(planted):
    seen = []
    x, targets = planted
    fit_router(
        x[:99], targets[:99], width=4, epochs=3, progress=lambda done, all: seen.append((done, all))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(5, D)}, r"\[5, 24\].*\[9, 12\]"),
        ({"x": torch.ones(9, 2, D)}, r"\[9, 2, 24\]"),
        ({"x": torch.ones(0, D), "targets": torch.ones(0, E)}, "No token"),
        ({"x": torch.ones(9, D).index_fill(0, torch.tensor([4]), torch.nan)}, "x holds NaN"),
        ({"targets": torch.full((9, E), torch.inf)}, "targets holds NaN or infinity"),
        ({"targets": -torch.ones(9, E)}, "negative"),
        ({"x": torch.ones(9, D, dtype=torch.long)}, "int64"),
        ({"width": 0}, "width 0"),
        ({"epochs": 0}, "epochs 0"),
        ({"level": 1.0}, r"level 1\.0"),
    ],
)
def test_bad_calibration_data_is_refused(change, message):
    arguments = {"x": torch.ones(9, D), "targets": torch.ones(9, E), "width": 4, "epochs": 1}
    with pytest.raises(CalibrationError, match=message):
        fit_router(**(arguments | change))


def test_routers_compare_by_identity(router):
    assert router == router
    assert router != Router(router.w1, router.w2, router.stats)


@pytest.mark.parametrize("level", [0.25, None])
def test_a_few_tokens_with_huge_outputs_do_not_own_the_fit(level):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=generator)
    plain = (x @ torch.randn(16, 8, generator=generator)).relu() + 0.02
    huge = torch.arange(len(x)) % 128 == 5
    x[huge, 0] = 8.0

    def found(factor):
        targets = torch.where(huge[:, None], factor * plain, plain)
        router = fit_router(x, targets, width=16, epochs=15, level=level)
        best = router(x).argmax(1) == plain.argmax(1)
        return best[~huge].float().mean().item()

    usual = found(1.0)
    assert usual > 0.7
    assert min(found(30.0), found(1000.0)) > usual - 0.1


def test_a_site_that_is_silent_on_all_tokens_runs_one_expert():
    x = torch.randn(640, D)
    router = fit_router(x, torch.zeros(640, E), width=8, epochs=3)
    scores = router(x)
    assert (scores >= 0.1 * scores.amax(1, keepdim=True)).float().mean() < 1.5 / E


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_patience_is_not_lost_between_two_validations(patience):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(640, 16, generator=generator)
    targets = (x @ torch.randn(16, 8, generator=generator)).relu()
    whole = fit_router(x, targets, width=8, epochs=30)
    early = fit_router(x, targets, width=8, epochs=30, patience=patience)
    assert early.stats["loss"] < 1.2 * whole.stats["loss"]
