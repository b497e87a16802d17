"""Kinds of routers, shared experts and clustering by co-activation, on a block that learned its experts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import d2dcompile as d2d
from d2dcompile import testing
from d2dcompile.attachment import states
from d2dcompile.cluster import random_split
from d2dcompile.errors import ArtifactError, CalibrationError, ConfigError, PlanError
from d2dcompile.judging import correlation, judge, ranks
from d2dcompile.router import fit_router
from d2dcompile.sample import Sample

D, GROUPS, SIZE = 32, 8, 8
H = GROUPS * SIZE


class Topics(nn.Module):
    """A ReLU block whose neurons fire by topic: each of 8 groups reads its own direction, in random order.

    Weights of one group share little but the direction, so that activations tell more than weights do.
    """

    def __init__(self, noise: float = 0.2) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        basis = torch.linalg.qr(torch.randn(D, D, generator=draw)).Q
        self.topics, unused = basis[:GROUPS], basis[GROUPS:]  # tokens have little of the latter
        self.groups = random_split(H, GROUPS, seed=5)
        apart = torch.randn(H, D - GROUPS, generator=draw) @ unused
        self.up.weight.data = 2 * self.topics[self.groups] + noise * apart
        self.up.bias.data.fill_(-1.0)
        self.down.weight.data = torch.randn(D, H, generator=draw) / 8
        self.down.bias.data.zero_()
        self.eval()

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))

    def batches(self, count=12, seed=0):
        """Tokens of one or two topics each."""
        draw = torch.Generator().manual_seed(seed)
        for _ in range(count):
            picked = torch.rand(64, GROUPS, generator=draw).topk(2).indices
            strength = torch.zeros(64, GROUPS).scatter_(1, picked, 1.0)
            strength *= 0.5 + torch.rand(64, GROUPS, generator=draw)
            yield strength @ self.topics + 0.05 * torch.randn(64, D, generator=draw)


def convert(model, batches=None, **changes):
    given = {"experts": GROUPS, "router_width": 32, "router_epochs": 12, **changes}
    batches = model.batches() if batches is None else batches
    return d2d.convert(model, batches, d2d.Config(**given), progress=False)


@torch.no_grad()
def error(model, dense, k=2, exact=False):
    """Relative output error with k experts per token."""
    x = next(iter(dense.batches(1, seed=9)))
    d2d.set_rule(model, "top_k", k)
    fast = torch.compile(model, backend="d2dmoe", options={"inner": "eager"})
    if exact:
        with testing.oracle(model):
            return float((fast(x) - dense(x)).norm() / (dense(x) - x).norm())
    return float((fast(x) - dense(x)).norm() / (dense(x) - x).norm())


@torch.no_grad()
def random_error(model, dense, k=2):
    """The same with random masks."""
    x = next(iter(dense.batches(1, seed=9)))
    mask = torch.rand(len(x), GROUPS).argsort(1) < k
    hidden = F.relu(model.up(x)) * mask.repeat_interleave(SIZE, 1)
    return float((x + model.down(hidden) - dense(x)).norm() / (dense(x) - x).norm())


@pytest.mark.parametrize("kind", ["norms", "classify", "centroid"])
def test_every_kind_of_router_beats_random_masks_by_far(kind):
    model, dense = Topics(), Topics()
    conversion = next(iter(convert(model, router=kind).experts.values()))
    assert error(model, dense) < random_error(model, dense) / 2
    if kind == "centroid":
        assert torch.equal(conversion.router2, torch.eye(GROUPS))
        assert conversion.plan.router_width == GROUPS
        rows = model.up.weight.detach().view(GROUPS, SIZE, D).mean(1)
        torch.testing.assert_close(conversion.router1, F.normalize(rows, dim=-1))


def test_the_oracle_bounds_every_router():
    model, dense = Topics(), Topics()
    convert(model)
    assert error(model, dense, exact=True) <= error(model, dense) + 1e-6


def test_a_classifier_learns_the_probabilities_of_its_targets():
    """1 - exp(-score) is sigmoid(logit), an estimate of the activations over their maximum.

    In cross-entropy above its least, the targets' own entropy, a tenth of the best constant's.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(4000, 6, generator=draw)
    targets = 3 * (x @ torch.rand(6, 5, generator=draw))
    router = fit_router(x, targets, width=32, epochs=20, classify=True)
    wanted = (targets / targets.max()).clamp_max(0.999)
    found, constant = -torch.expm1(-router(x)), wanted.mean(0).expand_as(wanted)
    least, ours, theirs = (
        F.binary_cross_entropy(p, wanted) for p in (wanted, found, constant.contiguous())
    )
    assert least <= ours < least + (theirs - least) / 10
    assert router.stats["exponent"] == 1


@pytest.mark.parametrize("kind", ["norms", "centroid"])
@pytest.mark.parametrize("rule", ["max", "top_k", "top_p"])
@torch.no_grad()
def test_shared_experts_always_run_and_cost_is_exact(kind, rule, tmp_path):
    model, dense = Topics(), Topics()
    conversion = convert(model, shared_experts=3, router=kind)
    experts = next(iter(conversion.experts.values()))
    assert experts.shared.sum() == 3
    x = next(iter(dense.batches(1, seed=9)))
    hidden = F.relu(model.up(x)).view(-1, GROUPS, SIZE)
    y = torch.einsum("tef,efd->ted", hidden, model.down.weight.T.reshape(GROUPS, SIZE, D))
    assert set(y.norm(dim=-1).mean(0).topk(2).indices.tolist()) <= set(
        experts.shared.nonzero().flatten().tolist()
    )
    d2d.set_rule(model, rule, {"max": 1.0, "top_k": 1, "top_p": 0.0}[rule])
    stats = d2d.measure(model, [x])
    assert stats.executed == pytest.approx(4 / GROUPS, abs=0.03)  # three, and the largest of others
    scores = F.linear(F.relu(F.linear(x, experts.router1)), experts.router2).abs()
    best = F.one_hot(scores.nan_to_num(-1).argmax(1), GROUPS).bool() | experts.shared
    silent = scores.nan_to_num(-1).amax(1) <= 0  # runs everything
    best |= silent[:, None]
    wanted = x + model.down(F.relu(model.up(x)) * best.repeat_interleave(SIZE, 1))
    fast = torch.compile(model, backend="d2dmoe", options={"inner": "eager"})
    torch.testing.assert_close(fast(x), wanted, rtol=1e-5, atol=1e-5)
    assert states(model)[0].expected_share() == pytest.approx(4 / GROUPS, abs=0.13)
    conversion.save(tmp_path)
    loaded = next(iter(d2d.load(tmp_path).experts.values()))
    assert torch.equal(loaded.shared, experts.shared)
    everything = {"max": 0.0, "top_k": GROUPS, "top_p": 1.0}[rule]
    d2d.set_rule(model, rule, everything)
    torch.testing.assert_close(fast(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spoilt", ["part of a row", "every row"])
def test_nan_in_a_file_is_a_whole_row_of_some_experts_or_refused(spoilt, tmp_path):
    model = Topics()
    conversion = convert(model, shared_experts=1)
    router2 = next(iter(conversion.experts.values())).router2
    if spoilt == "every row":
        router2.fill_(torch.nan)
    else:
        router2[0, :1] = torch.nan
        router2[0, 1:] = 1.0
    conversion.save(tmp_path)
    with pytest.raises(ArtifactError, match="router2 holds NaN"):
        d2d.load(tmp_path)


def test_shared_experts_need_others_beside_them():
    with pytest.raises(PlanError, match="shared_experts is 8 of 8"):
        convert(Topics(), shared_experts=GROUPS)
    with pytest.raises(CalibrationError, match="all of its 8 experts would be shared"):
        convert(Topics(), shared_experts=GROUPS, experts=None, expert_size=SIZE)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("rule", "top_q", "rule is 'top_q'; expected 'max' or 'top_k' or 'top_p'"),
        ("rule_value", 3, "rule 'max'; expected None"),
        ("router", "magic", "router is 'magic'"),
        ("shared_experts", -1, "shared_experts is -1"),
        ("router_patience", 1.5, r"router_patience is 1\.5"),
    ],
)
def test_bad_configuration_is_refused(field, value, match):
    with pytest.raises(ConfigError, match=match):
        d2d.Config(**{field: value})
    with pytest.raises(ConfigError, match="k is 0"):
        d2d.Config(rule="top_k", rule_value=0)
    with pytest.raises(ConfigError, match=r"tau is 0\.5 with rule 'top_p'"):
        d2d.Config(rule="top_p", tau=0.5)


def test_coactivation_finds_the_groups_and_reads_a_generator_once():
    model, dense = Topics(noise=1.5), Topics(noise=1.5)
    order = next(iter(convert(model, clustering="coactivation").experts.values())).permutation
    groups = dense.groups[order].view(GROUPS, SIZE)
    pure = np.mean([group.bincount().max() / SIZE for group in groups])
    assert pure > 0.8
    by_weights, at_random = Topics(noise=1.5), Topics(noise=1.5)
    convert(by_weights)
    convert(at_random, clustering="random")
    ours = error(model, dense, exact=True)
    assert ours < error(by_weights, dense, exact=True)
    assert ours < 0.8 * error(at_random, dense, exact=True)


def test_coactivation_is_repeatable_and_within_its_memory(monkeypatch):
    limits = []
    rows = Sample.rows

    def noted(self):
        limits.append(self.limit)
        return rows(self)

    monkeypatch.setattr(Sample, "rows", noted)
    a = convert(Topics(), clustering="coactivation", calibration_bytes=1 << 16)
    b = convert(
        Topics(), list(Topics().batches()), clustering="coactivation", calibration_bytes=1 << 16
    )
    for one, other in zip(a.experts.values(), b.experts.values(), strict=True):
        assert torch.equal(one.permutation, other.permutation)
    assert limits[0] == limits[2] == int((1 << 16) / (1.5 * H * 4))


def test_coactivation_refuses_values_that_are_not_finite():
    with pytest.raises(CalibrationError, match="Batch 0"):
        convert(Topics(), [torch.full((64, D), torch.nan)], clustering="coactivation")


def test_patience_ends_a_fit_that_improves_no_more_and_zero_changes_nothing():
    draw = torch.Generator().manual_seed(0)
    x, targets = torch.randn(800, D, generator=draw), torch.rand(800, 6, generator=draw)
    whole = fit_router(x, targets, width=64, epochs=40)
    short = fit_router(x, targets, width=64, epochs=40, patience=8)
    assert short.stats["epochs"] < whole.stats["epochs"] == 40
    assert short.stats["epochs"] - short.stats["epoch"] >= 8
    patient = fit_router(x, targets, width=64, epochs=40, patience=41)
    assert torch.equal(patient.w2, whole.w2) and patient.stats == whole.stats


def test_correlations_are_those_of_numpy_with_mean_ranks_for_ties():
    a = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    b = torch.tensor([[9.0, 1.0, 5.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    assert ranks(a).tolist() == [[3, 0, 1.5, 1.5], [1.5] * 4]
    wanted = np.corrcoef(a[0].numpy(), b[0].numpy())[0, 1]
    found = correlation(a, b)
    assert found[0].item() == pytest.approx(wanted) and found[1] == 0
    goal = torch.rand(50, 6)
    same, other = judge(goal.square(), goal), judge(torch.rand(50, 6), goal)
    assert same["spearman"] == pytest.approx(1) and same["row_spearman"] == pytest.approx(1)
    assert 0.8 < same["row_pearson"] < 1 and 0.8 < same["pearson"] < 1
    assert all(abs(other[key]) < 0.3 for key in ("pearson", "row_pearson", "spearman"))
