"""Models that are copied, reloaded, detached, converted again or wrapped after their conversion."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import d2dcompile as d2d
from d2dcompile import testing
from d2dcompile.attachment import states
from d2dcompile.errors import (
    CalibrationError,
    ConversionMismatchError,
    RuleError,
    WeightsChangedError,
)

SMALL = d2d.Config(experts=4, router_width=8, router_epochs=1)
EAGER = {"inner": "eager"}


@pytest.fixture
def dense() -> testing.Stack:
    return testing.Stack(depth=2).eval()


def data() -> list[torch.Tensor]:
    return [torch.randn(64, 16) for _ in range(2)]


def converted(dense: nn.Module, config: d2d.Config = SMALL) -> tuple[nn.Module, d2d.Conversion]:
    model = copy.deepcopy(dense)
    return model, d2d.convert(model, data(), config, progress=False)


def taus(model: nn.Module) -> list[float]:
    return [state.tau for state in states(model)]


@torch.no_grad()
def gap(model: nn.Module, dense: nn.Module) -> float:
    x = torch.randn(32, 16)
    return float((model(x) - dense(x)).abs().max())


def test_numbers_go_with_the_conversion_to_other_models_and_files(dense, tmp_path) -> None:
    model, conversion = converted(dense)
    d2d.set_tau(model, 0.3)
    twin = conversion.attach(copy.deepcopy(model))
    conversion.save(tmp_path)
    again = d2d.load(tmp_path).attach(copy.deepcopy(dense))
    assert taus(model) == taus(twin) == taus(again) == [0.3, 0.3]


def test_the_option_tau_reaches_layers_and_instances_that_share_a_graph(dense) -> None:
    model, _ = converted(dense)
    for block in model.blocks:
        block.compile(backend="d2dmoe", options={**EAGER, "tau": 0.5})
    with torch.no_grad():
        model(data()[0])
    assert taus(model) == [0.5, 0.5]
    d2d.set_tau(model, 0.2)
    with torch.no_grad():
        model(data()[0])
    assert taus(model) == [0.2, 0.2]


def test_another_conversion_than_the_attached_one_is_refused(dense, tmp_path) -> None:
    _, first = converted(dense)
    first.save(tmp_path)
    model, other = converted(dense, d2d.Config(experts=8, router_width=8, router_epochs=1))
    with (
        torch.no_grad(),
        pytest.raises(ConversionMismatchError, match="another conversion attached"),
    ):
        torch.compile(model, backend="d2dmoe", options={**EAGER, "conversion": tmp_path})(data()[0])
    with pytest.raises(ConversionMismatchError, match="another conversion attached"):
        d2d.rewrite(torch.fx.symbolic_trace(model), first)
    other.save(tmp_path)
    torch.compiler.reset()
    same = torch.compile(model, backend="d2dmoe", options={**EAGER, "conversion": tmp_path})
    assert gap(same, dense) < 1e-5


def test_a_block_that_the_conversion_leaves_out_stays_dense(dense) -> None:
    model, conversion = converted(dense)
    d2d.detach(model)
    first = next(iter(conversion.experts))
    part = d2d.Conversion({first: conversion.experts[first]}, {}, conversion.config)
    gm = d2d.rewrite(torch.fx.symbolic_trace(model), part)
    assert gap(gm, dense) < 1e-5


@pytest.mark.parametrize("after", ["detach", "convert"])
def test_a_rewritten_graph_outlives_the_models_conversion(dense, after: str) -> None:
    model, conversion = converted(dense)
    gm = d2d.rewrite(torch.fx.symbolic_trace(model), conversion)
    if after == "detach":
        d2d.detach(model)
    else:
        d2d.convert(model, data(), SMALL, progress=False)
    assert gap(gm, dense) < 1e-5 and gap(model, dense) < 1e-5


@pytest.mark.parametrize("after", ["detach", "attach"])
def test_a_checkpoint_loaded_into_a_converted_model_is_not_reordered(dense, after: str) -> None:
    model, conversion = converted(dense)
    model.load_state_dict(dense.state_dict())
    if after == "detach":
        d2d.detach(model)
        assert torch.equal(model.blocks[0].up.weight, dense.blocks[0].up.weight)
    else:
        conversion.attach(model)
        fast = torch.compile(model, backend="d2dmoe", options=EAGER)
        assert len(states(model)) == 2 and gap(fast, dense) < 1e-5


def test_detaching_and_converting_through_a_parent_finds_the_weights(dense) -> None:
    model, _ = converted(dense)
    parent = nn.Sequential(model)
    d2d.convert(parent, data(), SMALL, progress=False)
    assert len(states(parent)) == 2
    d2d.detach(parent)
    assert not states(model) and torch.equal(model.blocks[0].up.weight, dense.blocks[0].up.weight)


def test_detaching_where_a_weight_is_gone_says_so(dense) -> None:
    """And nothing is detached, the sites before it included."""
    model, _ = converted(dense)
    keep = model.blocks[1].up
    model.blocks[1].up = nn.Identity()
    with pytest.raises(WeightsChangedError, match=r"blocks\.1\.up\.weight.*is gone"):
        d2d.detach(nn.Sequential(model))
    assert len(states(model)) == 2
    model.blocks[1].up = keep
    assert gap(d2d.detach(model), dense) < 1e-5


def test_a_conversion_that_fails_leaves_its_own_error_and_the_earlier_conversion(dense) -> None:
    model, _ = converted(dense)
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(1.5)
    with pytest.raises(CalibrationError, match="NaN"):
        d2d.convert(model, [torch.full((64, 16), torch.nan)], SMALL, progress=False)
    assert len(states(model)) == 2
    with pytest.raises(WeightsChangedError), torch.no_grad():  # the edit is still noticed
        torch.compile(model, backend="d2dmoe", options=EAGER)(data()[0])


def test_converting_again_with_other_sizes_forgets_compiled_graphs(dense) -> None:
    model, _ = converted(dense)
    fast = torch.compile(model, backend="d2dmoe", options={"inner": "aot_eager"})
    assert gap(fast, dense) < 1e-5
    d2d.convert(model, data(), d2d.Config(experts=8, router_epochs=1), progress=False)
    assert gap(fast, dense) < 1e-5


def test_a_graph_of_other_sizes_is_told_apart(dense) -> None:
    model, _ = converted(dense)
    other, _ = converted(dense, d2d.Config(experts=8, router_epochs=1))
    fast, second = (torch.compile(m, backend="d2dmoe", options=EAGER) for m in (model, other))
    assert gap(fast, dense) < 1e-5
    with pytest.raises(RuleError, match=r"compiled for Plan\(experts=4.*Plan\(experts=8"):
        gap(second, dense)


def test_gradients_are_put_in_order_with_their_weights(dense) -> None:
    model = copy.deepcopy(dense)
    model(data()[0]).square().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    up = model.blocks[0].up.weight
    pairs = {
        tuple(row.tolist()): grad.clone() for row, grad in zip(up.detach(), up.grad, strict=True)
    }
    d2d.convert(model, data(), SMALL, progress=False)
    for row, grad in zip(up.detach(), up.grad, strict=True):
        assert torch.equal(pairs[tuple(row.tolist())], grad)
    d2d.detach(model)
    assert all(torch.equal(before[name], p.grad) for name, p in model.named_parameters())


class Broken(nn.Module):
    """Two blocks of one module, with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)
        self.fc3, self.fc4 = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.fc2(torch.relu(self.fc1(x)))
        torch._dynamo.graph_break()
        return x + self.fc4(torch.relu(self.fc3(x)))


def test_blocks_of_one_module_in_two_graphs_are_both_kept() -> None:
    model = nn.Sequential(Broken()).eval()
    dense = copy.deepcopy(model)
    conversion = d2d.convert(model, data(), SMALL, progress=False)
    assert len(conversion.experts) == 2 == len(states(model))
    assert gap(torch.compile(model, backend="d2dmoe", options=EAGER), dense) < 1e-5
    d2d.set_tau(model, 1.0)
    assert d2d.measure(model, data()).executed == 0.25


def test_another_thread_never_changes_the_operands_of_a_call(dense) -> None:
    """The look-up that a call has checked is the one it runs with, whatever another looks up meanwhile."""
    model, _ = converted(dense)
    d2d.set_tau(model, 1.0)
    other, _ = converted(testing.Stack(depth=2).eval())
    seen = []
    for one in (model, other):
        fast = torch.compile(one, backend="d2dmoe", options=EAGER)
        with torch.no_grad():
            fast(data()[0])
        seen.append(fast)
    from d2dcompile import calling

    x = data()[0]
    with torch.no_grad():
        wanted = seen[0](x)
        holds = calling.Looked.holds

        def interrupted(self, args):
            found = holds(self, args)
            calling.Looked.holds = holds
            seen[1](x)  # as another thread would, between the check and the run
            return found

        seen[0](x)
        calling.Looked.holds = interrupted
        try:
            assert torch.equal(seen[0](x), wanted)
        finally:
            calling.Looked.holds = holds


def test_first_calls_of_threads_share_one_copy_of_the_weights() -> None:
    model = testing.Stack(depth=1, d=64, h=512).eval()
    dense = copy.deepcopy(model)
    d2d.convert(model, [torch.randn(64, 64)], SMALL, progress=False)
    fast = torch.compile(model, backend="d2dmoe", dynamic=True)
    x, gaps, start = torch.randn(64, 64), [], threading.Barrier(4)
    with torch.no_grad():
        fast(x[:1])  # reads the weights where they lie

    @torch.no_grad()
    def call() -> None:
        start.wait()
        gaps.extend(float((fast(x) - dense(x)).abs().max()) for _ in range(20))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gaps) == 80 and max(gaps) < 1e-5


def test_compiled_graphs_keep_no_model_alive(dense) -> None:
    model, _ = converted(dense)
    fast = torch.compile(model, backend="d2dmoe", options={"inner": "aot_eager"})
    with torch.no_grad():
        fast(data()[0])
        fast(data()[0])
    storages = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    del model, fast
    gc.collect()
    assert not [ref for ref in storages if ref() is not None]


class Hidden(nn.Module):
    """A block that is a submodule, and one that is kept out of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.block = testing.Stack(depth=1)
        self.apart = [testing.Stack(depth=1)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.apart[0](self.block(x))
        return y


def test_a_block_that_is_no_part_of_the_model_stays_dense_with_a_reason() -> None:
    conversion = d2d.convert(Hidden().eval(), data(), SMALL, progress=False)
    assert len(conversion.experts) == 1
    assert any("no parameter of the model" in why for why in conversion.dense.values())
