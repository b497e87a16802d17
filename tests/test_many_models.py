"""Several models, and weights that are not the converted ones, in what one process compiles."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import d2dcompile as d2d
from d2dcompile.attachment import states
from d2dcompile.capture import source_path
from d2dcompile.errors import (
    CalibrationError,
    DenseFallbackWarning,
    NoConversionError,
    RuleError,
)

QUICK = d2d.Config(expert_size=8, router_width=8, router_epochs=1)
OPTIONS = {"inner": "eager"}


def mlp(hidden: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, 16)).eval()


def converted(model: nn.Module, config: d2d.Config = QUICK) -> nn.Module:
    d2d.convert(model, [torch.randn(640, 16)], config, progress=False)
    return model


def compiled(function, **options):
    return torch.compile(function, backend="d2dmoe", options={**OPTIONS, **options})


@torch.no_grad()
@pytest.mark.parametrize("how", ["arguments", "globals"])
def test_two_models_in_one_function_are_two_sites(how: str, monkeypatch) -> None:
    """Blocks of the same name in both; their experts, numbers of experts and taus are their own."""
    first, second = converted(mlp(64)), converted(mlp(96))
    d2d.set_tau(first, 0.3)
    d2d.set_tau(second, 0.6)
    x = torch.randn(32, 16)
    wanted = compiled(first)(x) + compiled(second)(x)
    torch.compiler.reset()
    if how == "arguments":
        found = compiled(lambda one, two, x: one(x) + two(x))(first, second, x)
    else:
        found = compiled(lambda x: first(x) + second(x))(x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("root", ["L['self']", "G['model']"])
def test_names_of_sites_do_not_show_where_dynamo_found_a_model(root: str) -> None:
    """A local variable or a global one: that of a global was "G['model.0.weight"."""
    path = f"{root}._modules['0']._parameters['weight']"
    assert source_path(path) == "0.weight"


class Broken(nn.Module):
    """Two blocks with a graph break between them."""

    def __init__(self, second: int = 72) -> None:
        super().__init__()
        self.one, self.two = mlp(), mlp(second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        torch._dynamo.graph_break()
        return self.two(x)


def test_a_block_that_convert_left_dense_may_be_alone_in_a_graph() -> None:
    """It was asked to stay dense; a block of a model without a conversion was not."""
    x = torch.randn(8, 16)
    model = Broken().eval()
    wanted = model(x)
    converted(model, replace(QUICK, exclude=("two",)))
    assert [state.site.name for state in states(model)] == ["one"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseFallbackWarning)
        torch.testing.assert_close(compiled(model)(x), wanted)
    d2d.detach(model)
    torch.compiler.reset()
    with pytest.raises(NoConversionError):
        compiled(model)(x)


def test_weights_that_are_no_parameters_run_dense_with_a_warning() -> None:
    """As `torch.func.functional_call` gives them, and replicas of `nn.DataParallel`."""
    model, x = converted(mlp()), torch.randn(8, 16)
    call = compiled(lambda weights, x: torch.func.functional_call(model, weights, (x,)))
    plain = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.warns(DenseFallbackWarning, match="not Parameters"):
        torch.testing.assert_close(call(plain, x), model(x))
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseFallbackWarning)
        call(dict(model.named_parameters()), x)


def test_a_copy_that_ran_dense_runs_experts_once_its_conversion_is_attached() -> None:
    """Its weights are in expert order already, so no stride changes that torch.compile guards on."""
    model, x = mlp(), torch.randn(32, 16)
    conversion = d2d.convert(model, [torch.randn(640, 16)], QUICK, progress=False)
    twin = copy.deepcopy(model)
    fast = compiled(twin, strict=False)
    with torch.no_grad(), pytest.warns(DenseFallbackWarning):
        dense = fast(x)
        conversion.attach(twin)
        d2d.set_tau(twin, 0.9)
        assert not torch.allclose(fast(x), dense, atol=1e-4)


class Transposed(nn.Module):
    """A block whose matrices are both stored neuron by neuron, so that converting changes no stride."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(64, 16) / 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.up).relu() @ self.down


class Layers(nn.Module):
    """Blocks that are compiled one by one: torch.compile makes one graph for all of them."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Transposed() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def test_a_graph_of_a_dense_block_refuses_a_converted_one_and_serves_the_other_way_round() -> None:
    x = torch.randn(8, 16)
    for left in ("blocks.0", "blocks.2"):
        model = Layers().eval()
        wanted = model(x)
        converted(model, replace(QUICK, exclude=(left,)))
        for block in model.blocks:
            block.compile(backend="d2dmoe", options=OPTIONS)
        if left == "blocks.0":
            with pytest.raises(RuleError, match=r"converted site 'blocks\.1'"):
                model(x)
        else:
            torch.testing.assert_close(model(x), wanted)
        torch.compiler.reset()


def test_excluded_blocks_stay_dense_where_the_conversion_is_an_option() -> None:
    x = torch.randn(8, 16)
    for attached in (True, False):
        model = Broken(64).eval()
        dense = copy.deepcopy(model)
        conversion = d2d.convert(
            model, [torch.randn(640, 16)], replace(QUICK, exclude=("two",)), progress=False
        )
        found = compiled(model if attached else dense, conversion=conversion)(x)
        torch.testing.assert_close(found, dense(x))
        torch.compiler.reset()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = mlp(), mlp(72)

    def forward(self, x: torch.Tensor, second: bool = False) -> torch.Tensor:
        return self.two(x) if second else self.one(x)


def test_a_block_that_calibration_never_saw_is_no_excluded_one() -> None:
    model = converted(Branches().eval())
    with pytest.raises(NoConversionError):
        compiled(model)(torch.randn(8, 16), second=True)


def test_what_is_excluded_stays_so_where_converting_again_fails_and_not_after_detaching() -> None:
    x = torch.randn(8, 16)
    model = converted(Broken().eval(), replace(QUICK, exclude=("two",)))
    with pytest.raises(CalibrationError):
        d2d.convert(model, [], QUICK, progress=False)
    compiled(model)(x)
    d2d.detach(model.one)
    torch.compiler.reset()
    with pytest.raises(NoConversionError):
        compiled(model.two)(x)


def test_a_weight_of_another_model_is_told_of_though_a_site_of_that_name_runs() -> None:
    first, second = converted(mlp()), converted(mlp())
    call = compiled(lambda x: (first(x), nn.functional.linear(x, second[0].weight)))
    with pytest.warns(DenseFallbackWarning, match="reads one of its weights alone"):
        call(torch.randn(8, 16))


def test_numbers_reach_all_sites_of_a_name() -> None:
    """Of parts that were converted apart: the last one alone used to be set, without a word."""
    both = nn.ModuleList([converted(mlp()), converted(mlp())])
    d2d.set_tau(both, 0.4)
    assert [state.tau for state in states(both)] == [0.4, 0.4]
    d2d.set_rule(both, "top_k", 2)
    assert [(state.rule, state.tau) for state in states(both)] == [("top_k", 2.0)] * 2


def test_matrices_of_dynamic_sizes_are_left_so() -> None:
    """Comparing their sizes with those of converted sites would fix them."""
    held = converted(mlp())
    assert states(held)
    x, weight = torch.randn(8, 64), torch.randn(16, 64)
    for matrix in (x, weight):
        torch._dynamo.mark_dynamic(matrix, 1)
    call = compiled(lambda x, w: nn.functional.linear(x, w))
    assert call(x, weight).shape == (8, 16)


def test_converting_anew_after_detaching_compiles_anew_where_sizes_changed() -> None:
    model, x = mlp(), torch.randn(8, 16)
    wanted = model(x)
    fast = compiled(converted(model))
    fast(x)
    d2d.detach(model)
    converted(model, replace(QUICK, expert_size=16))
    torch.testing.assert_close(fast(x), wanted)


def test_attaching_to_copies_leaves_graphs_of_other_models_alone() -> None:
    model, x = mlp(), torch.randn(8, 16)
    conversion = d2d.convert(model, [torch.randn(640, 16)], QUICK, progress=False)
    count = torch._dynamo.testing.CompileCounter()
    other = torch.compile(nn.Linear(16, 16), backend=count)
    other(x)
    for _ in range(2):
        conversion.attach(copy.deepcopy(model))
    other(x)
    assert count.frame_count == 1


class Nested(nn.Module):
    """A block by whose module's name another one is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc2(self.fc1(x).relu())
        torch._dynamo.graph_break()
        return self.inner(x)


@torch.no_grad()
@pytest.mark.parametrize("left", ["layer", "layer.inner"])
def test_a_converted_block_below_an_excluded_name_runs_its_experts(left: str) -> None:
    model, x = nn.ModuleDict({"layer": Nested()}), torch.randn(8, 16)
    model.forward = lambda x: model["layer"](x)
    wanted = model(x)
    converted(model, replace(QUICK, exclude=(left,)))
    fast = compiled(model)
    torch.testing.assert_close(fast(x), wanted)
    d2d.set_tau(model, 1.0)
    assert not torch.allclose(fast(x), wanted, atol=1e-4)


@torch.no_grad()
def test_excluded_blocks_of_a_flat_sequence_and_of_one_module() -> None:
    """Their names are the path of the first weight, which the second one's is not below of."""
    x = torch.randn(8, 16)
    flat = nn.Sequential(*mlp(), *mlp())
    wanted = flat(x)
    converted(flat, replace(QUICK, exclude=("3",)))
    torch.testing.assert_close(compiled(flat)(x), wanted)
    torch.compiler.reset()
    compiled(flat[3:])(x)


@torch.no_grad()
def test_a_block_that_was_excluded_and_is_converted_apart_runs_its_experts() -> None:
    model, x = nn.Sequential(mlp(), mlp()), torch.randn(8, 16)
    converted(model, replace(QUICK, exclude=("1",)))
    converted(model[1])
    fast, wanted = compiled(model), model(x)
    torch.testing.assert_close(fast(x), wanted)
    for state in states(model[1]):
        state.set_tau(1.0)
    assert not torch.allclose(fast(x), wanted, atol=1e-4)


@torch.no_grad()
def test_a_block_that_a_running_graph_has_dense_is_not_converted_unnoticed() -> None:
    model, x = Layers(2).eval(), torch.randn(8, 16)
    fast, wanted = compiled(model), model(x)
    converted(model, replace(QUICK, exclude=("blocks.1",)))
    torch.testing.assert_close(fast(x), wanted)
    converted(model)
    d2d.set_tau(model, {"blocks.1": 1.0})
    assert not torch.allclose(fast(x), wanted, atol=1e-4)


@torch.no_grad()
def test_what_is_excluded_stays_so_while_any_block_of_the_conversion_is_attached() -> None:
    model, x = nn.Sequential(mlp(), mlp(), mlp()), torch.randn(8, 16)
    converted(model, replace(QUICK, exclude=("2",)))
    d2d.detach(model[0])
    compiled(model[2])(x)
    d2d.detach(model[1])
    torch.compiler.reset()
    with pytest.raises(NoConversionError):
        compiled(model[2])(x)


@torch.no_grad()
def test_a_detached_block_that_ran_dense_runs_experts_once_attached_again() -> None:
    model, x = Layers(1).eval(), torch.randn(8, 16)
    conversion = d2d.convert(model, [torch.randn(640, 16)], QUICK, progress=False)
    d2d.detach(model)
    fast = compiled(model, strict=False)
    with pytest.warns(DenseFallbackWarning):
        dense = fast(x)
    conversion.attach(model)
    d2d.set_tau(model, 1.0)
    assert not torch.allclose(fast(x), dense, atol=1e-4)


def test_activations_of_a_weights_shape_are_no_matrices() -> None:
    held = converted(Layers(1).eval())
    assert states(held)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseFallbackWarning)
        compiled(nn.Linear(16, 16))(torch.randn(64, 16))
