"""Several models, and weights that are not the converted ones, in what one process compiles."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import d2dcompile as d2d
from d2dcompile.attachment import states
from d2dcompile.errors import DenseFallbackWarning, NoConversionError

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


def test_names_of_sites_do_not_show_where_dynamo_found_a_model() -> None:
    names: list[str] = []

    def seen(gm, inputs):
        from d2dcompile.capture import from_dynamo
        from d2dcompile.rewriting import match

        names.extend(found.site.name for found in match(from_dynamo(gm, inputs, {}))[0])
        return gm.forward

    first, second = mlp(64), nn.ModuleDict({"inner": mlp(96)})
    torch.compile(lambda x: first(x) + second["inner"](x), backend=seen)(torch.randn(4, 16))
    assert all("[" not in name and "'" not in name for name in names), names
    assert len(set(names)) == 2


class Broken(nn.Module):
    """Two blocks with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = mlp(), mlp(72)

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
    with pytest.warns(DenseFallbackWarning, match="not a Parameter"):
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
        assert not torch.allclose(fast(x), dense)
