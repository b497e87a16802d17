"""measure and fit_tau: exact counts, and budgets that are met."""

import copy

import pytest
import torch

import d2dcompile as d2d
from d2dcompile import testing
from d2dcompile.attachment import states
from d2dcompile.errors import BudgetError, CalibrationError, NoConversionError, WeightsChangedError
from d2dcompile.probe import flop_counter

QUICK = d2d.Config(router_epochs=2, expert_size=8)


def converted(depth: int = 2, config: d2d.Config = QUICK) -> testing.Stack:
    model = testing.Stack(depth)
    d2d.convert(model, [torch.randn(64, 16) for _ in range(4)], config, progress=False)
    return model


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(rows, 16, generator=generator) for rows in (40, 24)]


def test_at_tau_zero_everything_runs() -> None:
    stats = d2d.measure(converted(), batches())
    tokens, block, router = 64, 2 * 16 * 64, 128 * (16 + 8)
    assert stats.executed == 1.0
    assert stats.dense_macs == 2 * tokens * block
    assert stats.macs == 2 * tokens * (block + router)
    site = stats.sites["blocks.0"]
    assert (site.macs, site.dense_macs) == (tokens * (block + router), tokens * block)
    assert stats.bytes == stats.dense_bytes + 2 * 2 * router * 4
    assert stats.batches == 2


def test_counts_are_those_of_the_routers_masks() -> None:
    model = converted(1)
    d2d.set_tau(model, 0.5)
    experts = states(model)[0].experts
    pairs, read = 0, 0
    for x in batches():
        scores = (torch.relu(x @ experts.router1.T) @ experts.router2.T).abs()
        mask = scores >= 0.5 * scores.amax(1, keepdim=True)
        pairs += int(mask.sum())
        read += int(mask.any(0).sum())
    stats = d2d.measure(model, batches())
    slab, router = 2 * 16 * 8, 128 * (16 + 8)
    assert 0 < pairs < 64 * 8
    assert stats.executed == pairs / (64 * 8)
    assert stats.macs == pairs * slab + 64 * router
    assert stats.sites["blocks.0"].bytes == 4 * (read * slab + 2 * router)


@pytest.mark.parametrize("family", testing.FAMILIES)
def test_dense_figures_equal_those_of_the_dense_model(family: str) -> None:
    case = testing.tiny(family)
    dense = copy.deepcopy(case.model)
    d2d.convert(case.model, [case.inputs], QUICK, progress=False)
    d2d.set_tau(case.model, 0.5)
    with flop_counter() as counter, torch.no_grad():
        dense(**case.inputs)
    stats = d2d.measure(case.model, [case.inputs])
    assert stats.dense_macs == counter.get_total_flops() // 2
    assert stats.dense_macs - stats.macs == sum(s.dense_macs - s.macs for s in stats.sites.values())
    assert len(stats.sites) == case.blocks


def test_executed_share_falls_monotonically_in_tau() -> None:
    model, shares = converted(1), []
    for tau in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0):
        d2d.set_tau(model, tau)
        shares.append(d2d.measure(model, batches()).executed)
    assert shares[0] == 1.0 and shares == sorted(shares, reverse=True)
    assert 1 / 8 <= shares[-1] < 0.2  # the arg-max always runs


@pytest.mark.parametrize("budget", [0.3, 0.6, 0.9, 1.0])
def test_fit_tau_meets_an_executed_budget(budget: float) -> None:
    model = converted()
    tau = d2d.fit_tau(model, batches(), budget=budget)
    assert {state.tau for state in states(model)} == {tau}
    executed = d2d.measure(model, batches()).executed
    assert executed <= budget
    d2d.set_tau(model, max(tau - 0.02, 0.0))  # a slightly smaller tau is over, or all the budget
    assert d2d.measure(model, batches()).executed >= min(budget, 1.0) - 0.003 or tau == 0.0


def test_fit_tau_meets_a_share_of_multiply_adds_and_a_quality_floor() -> None:
    model = converted(config=d2d.Config(router_epochs=2, expert_size=8, router_width=4))
    d2d.fit_tau(model, batches(), macs=0.6)
    stats = d2d.measure(model, batches())
    assert 0.5 < stats.macs / stats.dense_macs <= 0.6
    x = torch.cat(batches())
    d2d.set_tau(model, 0.0)
    exact = model(x)

    def closeness(net: torch.nn.Module) -> float:
        fast = torch.compile(net, backend="d2dmoe", options={"inner": "eager"})
        with torch.no_grad():
            return float(torch.cosine_similarity(fast(x), exact).mean())

    floor = 0.999
    tau = d2d.fit_tau(model, batches(), quality=floor, metric=closeness)
    assert tau > 0 and closeness(model) >= floor


def test_fit_tau_refuses_what_cannot_be_met_and_restores_tau() -> None:
    model = converted()
    d2d.set_tau(model, {"blocks.0": 0.25})
    for wanted, match in (
        ({"budget": 0.01}, "Even tau = 1"),
        ({}, "Seen: no target"),
        ({"budget": 0.5, "macs": 0.5}, "Seen: budget, macs"),
        ({"quality": 0.5}, "Seen: quality"),
        ({"quality": 2.0, "metric": lambda net: 1.0}, "below the floor"),
    ):
        with pytest.raises(BudgetError, match=match):
            d2d.fit_tau(model, batches(), **wanted)
    assert [state.tau for state in states(model)] == [0.25, 0.0]


def test_measure_refuses_models_without_conversion_data_or_their_weights() -> None:
    with pytest.raises(NoConversionError, match=r"no attached conversion.*convert"):
        d2d.measure(testing.Stack(), batches())
    model = converted()
    with pytest.raises(CalibrationError, match="no batches to measure"):
        d2d.measure(model, [])
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(2)
    with pytest.raises(WeightsChangedError, match=r"blocks\.0\.up\.weight"):
        d2d.measure(model, batches())


def test_measuring_does_not_use_up_the_users_recompiles() -> None:
    model = converted()
    for rows in range(2, 14):
        d2d.measure(model, [torch.randn(rows, 16)])
    fast = torch.compile(model, backend="d2dmoe", fullgraph=True, options={"inner": "eager"})
    with torch.no_grad():
        assert fast(torch.randn(5, 16)).shape == (5, 16)
