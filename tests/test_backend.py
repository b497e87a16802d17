"""torch.compile(model, backend="d2dmoe"): exact at tau = 0, one compilation, never silently dense."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor
from torch.utils.checkpoint import checkpoint

import d2dcompile as d2d
from d2dcompile import backend as backend_module
from d2dcompile import lowering, testing
from d2dcompile.attachment import states
from d2dcompile.errors import (
    ConversionMismatchError,
    D2DWarning,
    DenseFallbackWarning,
    KernelError,
    NoConversionError,
    OptionError,
    TauError,
    WeightsChangedError,
)
from d2dcompile.kernels import native
from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.kernels.expert_mlp.gpu import EXPECTED
from d2dcompile.passes.forms import operand_names

QUICK = d2d.Config(router_epochs=1, expert_size=8)


class Counter:
    """How often an op's meaning ran: proof that a result came from experts and not from dense."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        meaning = expert_mlp.meaning

        def counted(*args):
            self.calls += 1
            return meaning(*args)

        monkeypatch.setattr(expert_mlp, "meaning", counted)


@pytest.fixture
def experts(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def converted(depth: int = 2, config: d2d.Config = QUICK, **kw) -> testing.Stack:
    model = testing.Stack(depth, **kw)
    d2d.convert(model, [torch.randn(64, 16) for _ in range(4)], config, progress=False)
    return model


def compiled(model: nn.Module, **options):
    options.setdefault("inner", "eager")
    return torch.compile(model, backend="d2dmoe", fullgraph=True, options=options)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("family", testing.FAMILIES)
def test_tau_zero_is_dense(family: str, inner: str, experts: Counter) -> None:
    """Forward under no_grad or inference_mode, fp32 and bf16: error at most twice the dense one's.

    Compiling is most of this file's time, so a dtype has one of the modes, and under Inductor a family has
    one of the dtypes: the next family has the other one.
    """
    source = testing.tiny(family)
    double = testing.in_dtype(source, torch.float64)
    with torch.no_grad():
        exact = testing.output(double.model(**double.inputs))
    dense = copy.deepcopy(source.model)
    d2d.convert(source.model, [source.inputs] * 2, QUICK, progress=False)
    dtypes = [torch.float32, torch.bfloat16]
    if inner == "inductor":
        dtypes = [dtypes[list(testing.FAMILIES).index(family) % 2]]
    for dtype in dtypes:
        case = testing.Tiny(source.model.to(dtype), testing.in_dtype(source, dtype).inputs, 0)
        dense.to(dtype)
        with torch.no_grad():
            rival = testing.output(dense(**case.inputs))
        plain = (dtype == torch.float32) == (inner == "inductor")
        torch._dynamo.reset()
        before = experts.calls
        with torch.no_grad() if plain else torch.inference_mode():
            result = testing.output(compiled(case.model, inner=inner)(**case.inputs))
        assert experts.calls - before == source.blocks
        assert testing.error_ratio(result, rival, exact) <= 2


def test_tau_sweep_compiles_once(experts: Counter) -> None:
    model = converted()
    x = torch.randn(32, 16)
    graphs = []
    original = backend_module._inner

    def counting(*args):
        graphs.append(args)
        return original(*args)

    backend_module._inner = counting
    try:
        fast = compiled(model, inner="inductor")
        outputs = []
        with torch.no_grad():
            for step in range(50):
                d2d.set_tau(model, step / 49)
                outputs.append(fast(x))
    finally:
        backend_module._inner = original
    assert len(graphs) == 1
    assert experts.calls == 50 * 2
    assert not torch.equal(outputs[0], outputs[-1])


def test_set_tau_works_through_the_compiled_module_and_per_site() -> None:
    model = converted()
    fast = compiled(model)
    with torch.no_grad():
        x = torch.randn(8, 16)
        dense = fast(x)
        d2d.set_tau(fast, {"blocks.0": 1.0})
        half = fast(x)
        d2d.set_tau(fast, 0.0)
        assert not torch.equal(half, dense)
        assert torch.equal(fast(x), dense)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_dynamic_rows_and_lengths(inner: str) -> None:
    """Sizes 0 and 1 specialise in torch itself; all others share one dynamic graph."""
    model = converted()
    dense = copy.deepcopy(model)
    fast = compiled(model, inner=inner)
    with torch.no_grad():
        for rows in (3, 5, 7, 9, 1, 0, 11, 4096):
            x = torch.randn(rows, 16)
            assert torch.allclose(fast(x), dense(x), atol=1e-5)


def test_dynamic_batch_and_sequence_of_a_transformer() -> None:
    case = testing.tiny("bert")
    dense = copy.deepcopy(case.model)
    d2d.convert(case.model, [case.inputs], QUICK, progress=False)
    fast = torch.compile(
        case.model, backend="d2dmoe", fullgraph=True, dynamic=True, options={"inner": "aot_eager"}
    )
    with torch.no_grad():
        for shape in ((2, 17), (3, 9), (5, 30)):
            ids = torch.randint(5, 90, shape)
            result, rival = (
                testing.output(fast(input_ids=ids)),
                testing.output(dense(input_ids=ids)),
            )
            assert torch.allclose(result, rival, atol=1e-5)


def test_training_gradients_equal_dense() -> None:
    model = converted()
    dense = copy.deepcopy(model)
    x = torch.randn(32, 16, requires_grad=True)
    fast = compiled(model, inner="aot_eager", trainable=True)
    fast(x).square().sum().backward()
    grads, x.grad = x.grad, None
    dense(x).square().sum().backward()
    assert torch.allclose(grads, x.grad, atol=1e-4)
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-3, rtol=1e-4)


def test_fine_tuning_steps_follow_the_weights() -> None:
    model = converted()
    fast = compiled(model, inner="aot_eager", trainable=True)
    dense = copy.deepcopy(model)
    for net in (fast, dense):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(16, 16)).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_one_graph_serves_other_layers_with_their_own_experts(experts: Counter) -> None:
    """Regional compilation: Dynamo reuses layer 0's graph, which must not keep layer 0's weights."""
    model = converted(4)
    dense = copy.deepcopy(model)
    d2d.set_tau(model, 0.0)
    for block in model.blocks:
        block.compile(backend="d2dmoe", fullgraph=True, options={"inner": "eager"})
    with torch.no_grad():
        x = torch.randn(8, 16)
        assert torch.allclose(model(x), dense(x), atol=1e-5)
    assert experts.calls == 4


def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compiled as a function of the model, so that Dynamo serves several models with one graph."""
    return model(x)


def neuron_major(model: testing.Stack) -> testing.Stack:
    """The same model in the layout of converted ones, so that Dynamo's guards on strides let it in."""
    for block in model.blocks:
        block.down.weight.data = block.down.weight.data.t().contiguous().t()
    return model


@pytest.mark.parametrize("strict", [True, False])
def test_another_instance_never_runs_with_foreign_weights(strict: bool, experts: Counter) -> None:
    model, other = converted(seed=0), neuron_major(testing.Stack(seed=1))
    x = torch.randn(8, 16)
    fast = compiled(call, strict=strict)
    with torch.no_grad():
        fast(model, x)
        calls = experts.calls
        if strict:
            with pytest.raises(NoConversionError, match="another instance of the model"):
                fast(other, x)
        else:
            with pytest.warns(DenseFallbackWarning, match="another instance of the model"):
                assert torch.equal(fast(other, x), other(x))
    assert experts.calls == calls


def test_two_converted_instances_each_use_their_own(experts: Counter) -> None:
    first, second = converted(seed=0), converted(seed=1)
    x = torch.randn(8, 16)
    fast = compiled(call)
    with torch.no_grad():
        for model in (first, second):
            dense = copy.deepcopy(model)
            assert torch.allclose(fast(model, x), dense(x), atol=1e-5)
    assert experts.calls == 4


def test_detach_after_compiling(experts: Counter) -> None:
    model = converted()
    x = torch.randn(8, 16)
    with torch.no_grad():
        strict, lenient = compiled(model), compiled(model, strict=False)
        strict(x)
        lenient(x)
        d2d.detach(model)
        calls = experts.calls
        with pytest.raises(NoConversionError):
            strict(x)
        with pytest.warns(DenseFallbackWarning):
            assert torch.equal(lenient(x), model(x))
    assert experts.calls == calls


def test_conversion_option_takes_object_and_folder(tmp_path, experts: Counter) -> None:
    model = testing.Stack()
    untouched = copy.deepcopy(model)
    conversion = d2d.convert(model, [torch.randn(64, 16)], QUICK, progress=False)
    conversion.save(tmp_path)
    x = torch.randn(8, 16)
    for given in (conversion, tmp_path, str(tmp_path)):
        for inner in ("eager", "inductor"):
            torch._dynamo.reset()
            fresh = copy.deepcopy(untouched)
            before = experts.calls
            with torch.no_grad():
                fast = compiled(fresh, conversion=given, inner=inner)
                for _ in range(2):  # the second call runs with the weights' new layout
                    assert torch.allclose(fast(x), untouched(x), atol=1e-5)
            assert experts.calls - before == 4


def test_tau_option_is_set_once_and_set_tau_wins_afterwards() -> None:
    model = converted()
    fast = torch.compile(model, backend="d2dmoe", options={"inner": "eager", "tau": 0.9})
    with torch.no_grad():
        fast(torch.randn(8, 16))
        assert {state.tau for state in d2d.attachment.states(model)} == {0.9}
        d2d.set_tau(model, 0.1)
        fast(torch.randn(9, 16))  # recompiles for a dynamic batch
    assert {state.tau for state in d2d.attachment.states(model)} == {0.1}


# What is refused, each with its own type and not wrapped in BackendCompilerFailed.


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"taus": 0.1}, OptionError, "Unknown option 'taus'.*expected some of: conversion, tau"),
        ({"inner": "tvm"}, OptionError, "'inner' is 'tvm'; expected one of inductor"),
        ({"strict": 1}, OptionError, "'strict' is 1; expected a bool"),
        ({"conversion": 3}, OptionError, "'conversion' is a int"),
        ({"tau": 1.5}, TauError, "tau is 1.5; expected a finite number in 0..1"),
        ({"tau": float("nan")}, TauError, "tau is nan"),
    ],
)
def test_bad_options_are_refused(options, error, match) -> None:
    fast = torch.compile(converted(1), backend="d2dmoe", options=options)
    with pytest.raises(error, match=match):
        fast(torch.randn(4, 16))


def test_modes_are_those_of_inductor() -> None:
    model = converted(1)
    with torch.no_grad():
        fast = torch.compile(model, backend="d2dmoe", mode="max-autotune-no-cudagraphs")
        assert torch.allclose(fast(torch.ones(4, 16)), model(torch.ones(4, 16)), atol=1e-5)


def test_no_conversion_is_an_error_that_names_convert() -> None:
    model, x = testing.Stack(), torch.randn(4, 16)
    fast = compiled(model)
    with pytest.raises(NoConversionError, match=r"No conversion for the 2 .*d2dcompile\.convert"):
        fast(x)
    d2d.convert(model, [x], QUICK, progress=False)
    assert torch.allclose(fast(x), model(x), atol=1e-5)  # the error was not compiled in


def test_not_strict_warns_once_and_runs_dense() -> None:
    model, x = testing.Stack(), torch.randn(4, 16)
    fast = compiled(model, strict=False)
    with pytest.warns(DenseFallbackWarning, match="Running dense"):
        assert torch.equal(fast(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(x)


def test_a_model_without_sites_is_no_error() -> None:
    model = nn.Linear(4, 4)
    assert torch.equal(compiled(model)(torch.ones(2, 4)), model(torch.ones(2, 4)))


@pytest.mark.parametrize("edit", ["add_", "copy_", "load_state_dict", "swap"])
def test_edited_weights_are_refused(edit: str) -> None:
    model, x = converted(), torch.randn(4, 16)
    fast = compiled(model)
    weight = model.blocks[1].up.weight
    with torch.no_grad():
        fast(x)
        if edit == "add_":
            weight.add_(1)
        elif edit == "copy_":
            weight.copy_(torch.zeros_like(weight))
        elif edit == "load_state_dict":
            model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
        else:
            weight.data = weight.data + 1
        with pytest.raises(
            WeightsChangedError, match=r"blocks\.\d.*changed after conversion.*convert"
        ):
            fast(x)


def test_same_values_written_again_are_accepted() -> None:
    model, x = converted(), torch.randn(4, 16)
    fast = compiled(model)
    with torch.no_grad():
        before = fast(x)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(fast(x), before)


def test_swapped_parameter_object_is_refused() -> None:
    model, x = converted(1), torch.randn(4, 16)
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        model.blocks[0].up.weight = nn.Parameter(model.blocks[0].up.weight + 1)
        with pytest.raises(NoConversionError, match="swapped parameter"):
            fast(x)


def test_conversion_for_other_weights_is_refused(tmp_path) -> None:
    donor, model = testing.Stack(seed=0), testing.Stack(seed=1)
    conversion = d2d.convert(donor, [torch.randn(64, 16)], QUICK, progress=False)
    with pytest.raises(
        ConversionMismatchError, match=r"made for other weights.*SHA-256.*run convert"
    ):
        conversion.attach(model)
    with pytest.raises(ConversionMismatchError, match="made for other weights"):
        compiled(model, conversion=conversion)(torch.randn(4, 16))


def test_casting_and_moving_keeps_the_conversion_and_tau() -> None:
    model = converted()
    d2d.set_tau(model, 0.3)
    model.to(torch.bfloat16)
    with torch.no_grad():
        fast = compiled(model)
        fast(torch.randn(4, 16, dtype=torch.bfloat16))
    state = d2d.attachment.states(model)[0]
    bits = state.tau_on(torch.device("cpu")).view(torch.float32)
    assert bits.item() == torch.tensor(0.3).item()


def test_converted_sites_that_do_not_match_are_named_in_a_warning() -> None:
    model, x = converted(1), torch.randn(4, 16)
    kept: list[torch.Tensor] = []
    model.blocks[0].up.register_forward_hook(lambda module, args, hidden: kept.append(hidden))
    fast = compiled(model)
    with torch.no_grad():
        with pytest.warns(
            DenseFallbackWarning, match=r"'blocks\.0' is converted but runs dense.*hidden value"
        ):
            result = fast(x)
        assert torch.equal(result, model(x))


class Autocast(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_runs_experts_in_its_dtype(inside: bool, inner: str, experts: Counter) -> None:
    """Entered inside of the graph or around the call; experts run as exactly as dense does."""
    plain = converted(2)
    model = Autocast(plain) if inside else plain
    fast = compiled(model, inner=inner)
    x = torch.randn(9, 16)
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        dense, found = model(x), fast(x)
    assert experts.calls == 2 and found.dtype == dense.dtype
    assert testing.error_ratio(found, dense, exact) <= 2


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_active_dropout_between_the_matrices_is_drawn_as_dense_draws_it(inner: str) -> None:
    """In training mode the same seed gives the same output and gradients as the dense model."""

    def act(h: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(torch.relu(h), 0.5, training=True)

    torch.manual_seed(0)
    model = torch.nn.Sequential(testing.FFN(act=act), testing.FFN(act=act)).double().train()
    d2d.convert(model, [torch.randn(64, 16).double()], QUICK, progress=False)
    fast = compiled(model, inner=inner)
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    results = []
    patch = {"fallback_random": True} if inner == "inductor" else {}
    with torch._inductor.config.patch(patch):
        for run in (model, fast):
            torch.manual_seed(1)
            y = run(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])))
    for found, expected in zip(*reversed(results), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-11)
    assert not torch.equal(model(x), model(x)), "the dropout does nothing"


def test_blocks_in_an_activation_checkpoint_run_as_experts_and_train(experts: Counter) -> None:
    class Checkpointed(testing.Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model = Checkpointed(2).double()
    d2d.convert(model, [torch.randn(64, 16).double()], QUICK, progress=False)
    x = torch.randn(5, 16, dtype=torch.float64)
    for inner in ("eager", "aot_eager", "inductor"):
        torch._dynamo.reset()
        fast = compiled(model, inner=inner)
        before = experts.calls
        y = fast(x)
        assert experts.calls == before + 2
        found = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for f, e in zip(found, expected, strict=True):
            assert torch.allclose(f, e, rtol=0, atol=1e-10)


def test_the_output_of_experts_may_be_changed_in_place_while_training() -> None:
    """Falcon adds its attention to the block's output with +=."""

    class InPlace(testing.FFN):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.down(self.act(self.up(x)))
            y += x
            return y

    model = nn.Sequential(InPlace()).double()
    d2d.convert(model, [torch.randn(64, 16).double()], QUICK, progress=False)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y = compiled(model)(x)
    found = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for f, e in zip(found, expected, strict=True):
        assert torch.allclose(f, e, rtol=0, atol=1e-10)


def test_freezing_keeps_the_experts_and_their_checks(experts: Counter) -> None:
    """Inductor's freezing makes weights attributes of the graph: each model's own, and edits are refused."""
    models = [nn.Sequential(testing.Stack(seed=seed), nn.Linear(16, 24)).eval() for seed in (0, 1)]
    x = torch.randn(32, 16)
    with torch.no_grad(), inductor.patch(freezing=True):
        for model in models:
            d2d.convert(model, [torch.randn(64, 16)], QUICK, progress=False)
            experts.calls = 0
            fast = compiled(model, inner="inductor")
            torch.testing.assert_close(fast(x), model(x))
            assert experts.calls == 2
            d2d.set_tau(model, 1.0)
            assert not torch.allclose(fast(x), model(x))
        torch.testing.assert_close(compiled(models[1], inner="eager")(x), fast(x))
        models[1][0].blocks[0].up.weight.mul_(1.5)
        with pytest.raises(WeightsChangedError):
            fast(x)


def test_expected_shares_follow_tau_and_end_with_the_site() -> None:
    """GPU kernels may run everything only for attached sites, for the share to expect at their tau."""
    model = converted()
    state = states(model)[0]
    with torch.no_grad():
        w_up = state.operands()[operand_names(state.site).index("w_up")]
    address = w_up.data_ptr()
    assert EXPECTED[address] == state.expected_share()
    d2d.set_tau(model, 0.0)
    assert EXPECTED[address] == 1.0
    for parameter in model.parameters():
        parameter.requires_grad_()
    state.operands()
    assert (
        address not in EXPECTED
    )  # the lists have to be obeyed: gradients are those of their experts
    with torch.no_grad():
        state.operands()
    d2d.detach(model)
    assert address not in EXPECTED


def test_int8_without_a_kernel_says_so() -> None:
    """These blocks are smaller than what is worth compiling, so that no kernel runs them."""
    model = converted()
    with (
        torch.no_grad(),
        pytest.warns(D2DWarning, match=r"int8=True has no effect on 2 of 2 blocks"),
    ):
        compiled(model, int8=True)(torch.randn(3, 16))


def test_operands_are_static_inputs_for_cuda_graphs(monkeypatch) -> None:
    """What Inductor copies at every replay is the input alone, not weights and routers."""
    from torch._inductor import compile_fx

    seen = []
    inner = compile_fx._compile_fx_inner

    def spy(gm, example_inputs, **kwargs):
        seen.append((len(example_inputs), list(kwargs["static_input_idxs"])))
        return inner(gm, example_inputs, **kwargs)

    monkeypatch.setattr(compile_fx, "_compile_fx_inner", spy)
    with torch.no_grad(), inductor.patch(force_disable_caches=True):
        compiled(converted(), inner="inductor")(torch.randn(3, 16))
    ((count, static),) = seen
    assert len(static) == count - 1


def test_report_names_the_schedules_on_a_gpu(monkeypatch) -> None:
    """Here for the device that the cost model takes where none is."""
    monkeypatch.setattr(lowering, "_on_gpu", lambda state: True)
    model = converted()
    found = lowering.running(states(model)[0])
    assert "1 tokens: d" in found and "64 tokens: d" in found and "4096 tokens: " in found
    assert f"share of {states(model)[0].expected_share():.2f}" in found


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_an_implementation_asked_for_by_the_variable_runs(
    inner: str, experts: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under Inductor too, which calls the kernel of a whole block itself."""
    monkeypatch.setattr(native, "SMALLEST", 0)
    monkeypatch.setenv("D2D_IMPL", "expert_mlp:reference")
    model = converted(depth=1)
    with torch.no_grad():
        compiled(model, inner=inner)(torch.randn(5, 16))
    assert experts.calls == 1


def test_an_implementation_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block run as separate ops never calls the op whose implementation is misspelt."""
    monkeypatch.setenv("D2D_IMPL", "dynamic_mlp:cpuu")
    model = converted(depth=1)
    with torch.no_grad(), pytest.raises(KernelError, match="asks for dynamic_mlp:cpuu; known: cpu"):
        compiled(model)(torch.randn(5, 16))
