"""sparsify: gradients of task loss + weight * penalty in loops that know nothing of a penalty."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import d2dcompile as d2d
from d2dcompile import testing
from d2dcompile.errors import CalibrationError, SparsifyError
from d2dcompile.penalties import L1, PENALTIES, Clamped, Hoyer, gradient

WEIGHT = 3.0
FP32 = 1e-6  # of models that compute their loss in fp32
Grads = dict[str, Tensor]


def inputs(rows: int = 24, d: int = 16) -> Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def stack(**sizes: Any) -> testing.Stack:
    model = testing.Stack(**sizes).double()
    return model.train()


def grads(model: nn.Module) -> Grads:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(left: Grads, right: Grads, tolerance: float = 1e-9) -> None:
    assert left.keys() == right.keys()
    for name, value in right.items():
        error = (left[name] - value).abs().max()
        assert error <= tolerance * max(1.0, float(value.abs().max())), (name, float(error))


def mean_square(output: Any) -> Tensor:
    return testing.output(output).square().mean()


@contextmanager
def collected(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What modules return, to write the penalty into the loss by hand."""
    values: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _, args, out: values.append(out)) for m in modules]
    yield values
    for handle in handles:
        handle.remove()


def explicit(
    model: nn.Module,
    modules: list[nn.Module],
    run: Callable[[], Tensor],
    penalty: Callable[[Tensor], Tensor] = PENALTIES["hoyer"],
    weight: float = WEIGHT,
) -> Grads:
    """Gradients of loss + weight * penalty, written out, and of a penalty that matters."""
    torch.manual_seed(7)
    run().backward()
    task = grads(model)
    torch.manual_seed(7)
    with collected(modules) as values:
        loss = run()
        (loss + weight * sum(penalty(a).mean() for a in values) / len(values)).backward()
    found = grads(model)
    assert max(float((found[n] - task[n]).abs().max() / task[n].abs().max()) for n in task) > 1e-3
    return found


def injected(model: nn.Module, run: Callable[[], Tensor]) -> Grads:
    torch.manual_seed(7)
    run().backward()
    return grads(model)


class Acts(nn.Module):
    """A stack whose activations are modules, so that a test can listen to them."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.stack = stack()
        for block in self.stack.blocks:
            block.act = copy.deepcopy(act) if act else nn.GELU()

    @property
    def acts(self) -> list[nn.Module]:
        return [block.act for block in self.stack.blocks]

    @property
    def ups(self) -> list[nn.Module]:
        return [block.up for block in self.stack.blocks]

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        y = self.stack(x)
        return y if target is None else {"loss": (y - target).square().mean(), "y": y}


# Penalties


@pytest.mark.parametrize("name", PENALTIES)
def test_closed_gradients(name: str) -> None:
    penalty = PENALTIES[name]

    class Closed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor) -> Tensor:
            ctx.save_for_backward(a)
            return penalty(a)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.unsqueeze(-1) * penalty.gradient(ctx.saved_tensors[0])

    a = (torch.randn(5, 12, dtype=torch.float64) * 8).requires_grad_()
    assert torch.autograd.gradcheck(Closed.apply, (a,))
    by_autograd = torch.autograd.grad(penalty(a).sum(), a)[0]
    torch.testing.assert_close(penalty.gradient(a.detach()), by_autograd)
    torch.testing.assert_close(gradient(penalty.__call__, a.detach()), by_autograd)


def test_penalties_lie_between_zero_and_one_and_hoyer_is_the_share_of_active_neurons() -> None:
    a = torch.zeros(3, 8)
    a[0, 0], a[1, :4], a[2] = 5.0, -2.0, 0.1
    torch.testing.assert_close(Hoyer()(a), torch.tensor([1 / 8, 1 / 2, 1.0]))
    torch.testing.assert_close(Hoyer()(1e4 * a), Hoyer()(a))
    torch.testing.assert_close(L1()(a), torch.tensor([5 / 8, 1.0, 0.1]))
    assert Clamped(Hoyer())(torch.full((1, 8), -11.0)) == 1 / 8


def test_dead_tokens_win_nothing() -> None:
    a = torch.zeros(2, 8)
    a[1] = 1e-9
    assert Hoyer()(a).tolist() == [1 / 8, 1 / 8]
    assert not Hoyer().gradient(a).any()
    live = torch.rand(4, 8)
    along = (Hoyer().gradient(live) * live).sum(-1)
    assert along.abs().max() < 1e-6  # never towards zero, nor away from it


# The gradient is that of the sum


@pytest.mark.parametrize("name", PENALTIES)
def test_gradients_of_a_plain_block(name: str) -> None:
    model, x = Acts(), inputs()
    where = model.ups if name.startswith("clamped") else model.acts
    wanted = explicit(model, where, lambda: mean_square(model(x)), PENALTIES[name])
    before = model(x)
    handle = d2d.sparsify(model, x, penalty=name, weight=WEIGHT)
    assert torch.equal(model(x), before)
    same(injected(model, lambda: mean_square(model(x))), wanted)
    handle.remove()
    model(x).square().mean().backward()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


FAMILIES: dict[str, Callable[[Any], list[nn.Module]]] = {
    "bert": lambda m: [layer.intermediate for layer in m.encoder.layer],
    "gpt2": lambda m: [layer.mlp.act for layer in m.transformer.h],
    "llama": lambda m: [layer.mlp.act_fn for layer in m.model.layers],
    "phi3": lambda m: [layer.mlp.activation_fn for layer in m.model.layers],  # fused, one half
    "t5": lambda m: [
        b.layer[-1].DenseReluDense.act for s in (m.encoder, m.decoder) for b in s.block
    ],
}  # t5 has active dropout behind its activation


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_family(family: str) -> None:
    case = testing.in_dtype(testing.tiny(family), torch.float64)
    model = case.model.train()

    def run() -> Tensor:
        return mean_square(model(**case.inputs))

    wanted = explicit(model, FAMILIES[family](model), run)
    d2d.sparsify(model, case.inputs, weight=WEIGHT)
    same(injected(model, run), wanted)


def test_hidden_of_a_gated_block() -> None:
    case = testing.in_dtype(testing.tiny("llama"), torch.float64)
    model = case.model.train()

    def run() -> Tensor:
        return mean_square(model(**case.inputs))

    hidden: list[Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        for layer in model.model.layers
    ]
    (run() + WEIGHT * sum(L1()(a).mean() for a in hidden) / 2).backward()
    wanted = grads(model)
    for hook in hooks:
        hook.remove()
    d2d.sparsify(model, case.inputs, penalty="l1", at="hidden", weight=WEIGHT)
    same(injected(model, run), wanted)


def test_channels_first_interleaved_and_in_place() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fused, self.act, self.down = nn.Linear(8, 48), nn.SiLU(), nn.Linear(24, 8)
            self.wide, self.relu, self.back = nn.Conv1d(8, 24, 1), nn.ReLU(), nn.Conv1d(24, 8, 1)
            self.inplace = False

        def forward(self, x: Tensor) -> Tensor:
            u = self.fused(x)
            x = x + self.down(self.act(u[..., 1::2]) * u[..., ::2])
            v = self.wide(x.transpose(1, 2))
            h = torch.dropout(v.relu_() if self.inplace else self.relu(v), 0.3, self.training)
            return x + self.back(h).transpose(1, 2)

    model, x = Odd().double().train(), inputs().view(2, 24, 8)

    def features_last(a: Tensor) -> Tensor:
        return Hoyer()(a.transpose(1, 2) if a.shape[1:] == (24, 24) and a.min() >= 0 else a)

    wanted = explicit(model, [model.act, model.relu], lambda: mean_square(model(x)), features_last)
    model.inplace = True
    handle = d2d.sparsify(model, x, weight=WEIGHT)
    assert [(t.axis, t.half, t.copied) for t in handle.taps] == [(-1, 1, False), (-2, None, True)]
    same(injected(model, lambda: mean_square(model(x))), wanted)


def test_weights_run_several_times_are_a_mean_over_their_calls() -> None:
    model, x = Acts(), inputs()
    model.stack.blocks = nn.ModuleList([model.stack.blocks[0]] * 3)
    wanted = explicit(model, model.acts[:1], lambda: mean_square(model(x)))
    handle = d2d.sparsify(model, x, weight=WEIGHT)
    assert [tap.calls for tap in handle.taps] == [3]
    same(injected(model, lambda: mean_square(model(x))), wanted)


def test_own_penalties_and_factors_by_site() -> None:
    model, x = Acts(), inputs()
    wanted = explicit(
        model, model.acts[1:], lambda: mean_square(model(x)), lambda a: 2 * a.square().mean(-1)
    )
    d2d.sparsify(
        model, x, penalty=lambda a: a.square().mean(-1), weight=WEIGHT,
        sites={"stack.blocks.0": 0, "stack.blocks.1": 2},
    )  # fmt: skip
    same(injected(model, lambda: mean_square(model(x))), wanted)


def test_one_weight_at_every_width() -> None:
    narrow, wide = stack(h=32), stack(h=64)
    with torch.no_grad():
        for small, large in zip(narrow.blocks, wide.blocks, strict=True):
            for name in ("weight", "bias"):
                up = getattr(small.up, name)
                getattr(large.up, name).copy_(up.repeat_interleave(2, 0))
            large.down.weight.copy_(small.down.weight.repeat_interleave(2, 1) / 2)
            large.down.bias.copy_(small.down.bias)
    for penalty in PENALTIES:
        found = []
        for model in (narrow, wide):
            x = inputs().requires_grad_()
            handle = d2d.sparsify(model, x.detach(), penalty=penalty, weight=WEIGHT)
            model(x).square().mean().backward()
            handle.remove()
            found.append(x.grad)
        torch.testing.assert_close(*found)


# Loops


def test_nothing_in_eval_mode_or_without_gradients() -> None:
    model, x = stack(), inputs()
    handle = d2d.sparsify(model, x, weight=WEIGHT)
    with torch.no_grad():
        assert model(x).grad_fn is None
    model.eval()
    mean_square(model(x)).backward()
    evaluated = grads(model)
    handle.remove()
    mean_square(model(x)).backward()
    same(evaluated, grads(model), 0.0)
    assert not handle.stats


def accumulated(model: nn.Module, x: Tensor, target: Tensor, parts: int) -> Grads:
    for part, goal in zip(x.chunk(parts), target.chunk(parts), strict=True):
        (model(part, goal)["loss"] / parts).backward()
    return grads(model)


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_accumulation(parts: int) -> None:
    model, x = Acts(), inputs()
    target = inputs().flip(0)
    wanted = explicit(model, model.acts, lambda: model(x, target)["loss"])
    d2d.sparsify(model, (x, target), weight=WEIGHT)
    same(accumulated(model, x, target, parts), wanted)


@pytest.mark.parametrize("form", ["tuple", "scalar"])
def test_losses_in_other_outputs(form: str) -> None:
    class Returning(Acts):
        def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
            loss = (self.stack(x) - target).square().mean()
            return loss if form == "scalar" else (loss, x)

    model, x, target = Returning(), inputs(), inputs().flip(0)

    def run(scale: float) -> Tensor:
        out = model(x, target)
        return (out if form == "scalar" else out[0]) * scale

    wanted = explicit(model, model.acts, lambda: run(1.0))
    d2d.sparsify(model, (x, target), weight=WEIGHT)
    same(injected(model, lambda: run(8.0)), {name: 8 * grad for name, grad in wanted.items()})


@pytest.mark.parametrize("kind", ["number", "module", "function", "scaler"])
def test_losses_outside_of_the_model(kind: str) -> None:
    model, x, target = Acts(), inputs(), inputs().flip(0)
    loss = nn.MSELoss()
    wanted = explicit(model, model.acts, lambda: loss(model(x), target))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    factor = 1 / 4 if kind != "scaler" else 1.0
    given = {"number": 1 / 4, "module": loss, "function": lambda: 1 / 4, "scaler": scaler}[kind]
    d2d.sparsify(model, x, weight=WEIGHT, loss_scale=given)
    for part, goal in zip(x.chunk(4), target.chunk(4), strict=True):
        value = loss(model(part), goal)
        (scaler.scale(value) if kind == "scaler" else value * factor).backward()
    if kind == "scaler":  # four micro-batches that are not divided are a sum
        wanted = {name: 4 * 2.0**12 * grad for name, grad in wanted.items()}
    same(grads(model), wanted)


def test_the_scale_of_a_gradient_scaler_is_read_off_at_the_loss() -> None:
    model, x, target = Acts(), inputs(), inputs().flip(0)
    wanted = explicit(model, model.acts, lambda: model(x, target)["loss"])
    d2d.sparsify(model, (x, target), weight=WEIGHT)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scaler.scale(model(x, target)["loss"]).backward()
    scaler.unscale_(optimizer)
    same(grads(model), wanted)


def test_an_unknown_scale_of_half_precision_is_refused() -> None:
    model, x = stack(), inputs()
    handle = d2d.sparsify(model, x, weight=WEIGHT)
    with torch.autocast("cpu", torch.float16):
        loss = mean_square(model.float()(x.float()))
    with pytest.raises(SparsifyError, match=r"Its scale is unknown; expected loss_scale=scaler"):
        loss.backward()
    handle.remove()
    loss = nn.MSELoss()
    d2d.sparsify(model, x.float(), weight=WEIGHT, loss_scale=loss)
    with pytest.raises(SparsifyError, match="from a loss that is not that of loss_scale"):
        mean_square(model(x.float())).backward()


def test_sums_over_the_labels_of_a_step() -> None:
    """As Hugging Face's Trainer accumulates: micro-batches of unequal size, divided by all labels."""
    case = testing.in_dtype(testing.tiny("llama"), torch.float64)
    model, ids = case.model.train(), torch.randint(0, testing.VOCABULARY, (5, 17))
    wanted = explicit(model, FAMILIES["llama"](model), lambda: model(ids, labels=ids).loss)
    d2d.sparsify(model, {"input_ids": ids}, weight=WEIGHT)
    for part in ids.split([3, 2]):
        model(part, labels=part, num_items_in_batch=torch.tensor(5 * 16)).loss.backward()
    same(grads(model), wanted, FP32)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(reentrant: bool) -> None:
    class Checkpointed(Acts):
        def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
            if not self.training:
                return super().forward(x, target)
            y = checkpoint(super().forward, x.requires_grad_(), use_reentrant=reentrant)
            return {"loss": y.square().mean()}

    model, x = Checkpointed(), inputs()
    plain = Acts()
    wanted = explicit(plain, plain.acts, lambda: mean_square(plain(x.detach())))
    handle = d2d.sparsify(model, x, weight=WEIGHT)
    same(injected(model, lambda: model(x)["loss"] / 2), {k: v / 2 for k, v in wanted.items()})
    assert len(handle.stats) == 2


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_checkpointing_of_hugging_face(family: str) -> None:
    case = testing.in_dtype(testing.tiny(family), torch.float64)
    model = case.model.train()
    wanted = explicit(model, FAMILIES[family](model), lambda: mean_square(model(**case.inputs)))
    d2d.sparsify(model, case.inputs, weight=WEIGHT)
    model.gradient_checkpointing_enable()
    same(injected(model, lambda: mean_square(model(**case.inputs))), wanted)


@pytest.mark.parametrize(
    ("backend", "first"),
    [("eager", "sparsify"), ("aot_eager", "compile"), ("inductor", "sparsify")],
)
def test_compiled(backend: str, first: str) -> None:
    model, x, target = Acts(), inputs(), inputs().flip(0)
    wanted = explicit(model, model.acts, lambda: model(x, target)["loss"])
    fast = torch.compile(model, backend=backend, fullgraph=True)
    if first == "compile":
        fast(x, target)["loss"].backward()
        grads(model)
    given = model if first == "compile" else fast
    handle = d2d.sparsify(given, (x, target), weight=WEIGHT, schedule="linear", steps=10)
    handle.steps = 10
    same(injected(model, lambda: fast(x, target)["loss"]), wanted)
    with torch._dynamo.config.patch(error_on_recompile=True):
        same(
            injected(model, lambda: fast(x, target)["loss"] / 2),
            {k: v / 2 for k, v in wanted.items()},
        )
        handle.steps = 5
        half = injected(model, lambda: fast(x, target)["loss"])
    handle.remove()
    task = injected(model, lambda: fast(x, target)["loss"])
    same(half, {name: (task[name] + wanted[name]) / 2 for name in wanted})


def test_compiled_hugging_face_model() -> None:
    case = testing.in_dtype(testing.tiny("llama"), torch.float64)
    model, ids = case.model.train(), case.inputs["input_ids"]
    wanted = explicit(model, FAMILIES["llama"](model), lambda: model(ids, labels=ids).loss)
    d2d.sparsify(model, case.inputs, weight=WEIGHT)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    items = torch.tensor(4 * ids[:, 1:].numel())  # of a step, of which this is a quarter
    got = injected(model, lambda: fast(ids, labels=ids, num_items_in_batch=items).loss)
    same(got, {name: grad / 4 for name, grad in wanted.items()}, FP32)


def test_distributed(tmp_path: Any) -> None:
    model, x, target = Acts(), inputs(), inputs().flip(0)
    wanted = explicit(model, model.acts, lambda: model(x, target)["loss"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        d2d.sparsify(wrapped, (x, target), weight=WEIGHT)
        same(injected(model, lambda: wrapped(x, target)["loss"]), wanted)
    finally:
        torch.distributed.destroy_process_group()


def test_graphs_of_evaluation_are_those_without() -> None:
    case = testing.tiny("llama")
    before = str(d2d.explain(case.model, **case.inputs))
    d2d.sparsify(case.model.train(), case.inputs, weight=WEIGHT)
    assert case.model.training and str(d2d.explain(case.model, **case.inputs)) == before


# Steps, statistics


def test_steps_are_those_of_the_optimizer() -> None:
    model, x = stack(), inputs()
    handle = d2d.sparsify(model, x, weight=4.0, schedule="linear_warmup", steps=8)
    halves = [list(block.parameters()) for block in model.blocks]
    others = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    optimizers = [torch.optim.SGD(half, 0.0) for half in halves]
    weights = []
    for _ in range(6):
        for _ in range(2):  # micro-batches
            mean_square(model(x)).backward()
        weights.append(handle.weight)
        for optimizer in (others, *optimizers):
            optimizer.step()
    assert handle.steps == 6 and weights == [0, 1, 2, 3, 4, 4]
    handle.step()
    optimizers[0].step()
    assert handle.steps == 7  # by hand from now on


def test_schedules() -> None:
    model, x = stack(), inputs()
    for schedule, wanted in {
        "constant": [2, 2, 2, 2],
        "linear": [0, 1, 2, 2],
        "linear_warmup": [0, 2, 2, 2],
        lambda step: step**2: [0, 50, 200, 450],
    }.items():
        handle = d2d.sparsify(model, x, weight=2.0, schedule=schedule, steps=10)
        found = []
        for steps in (0, 5, 10, 15):
            handle.steps = steps
            found.append(handle.weight)
        assert found == wanted
        handle.remove()


def test_statistics() -> None:
    model, x = Acts(nn.ReLU()), inputs()
    handle = d2d.sparsify(model, x, weight=WEIGHT, log_every=2)
    assert handle.stats == {}
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    with collected(model.acts) as values:
        mean_square(model(x)).backward()
    first = handle.stats
    for a, stats in zip(values, first.values(), strict=True):
        assert stats.step == 0
        assert stats.zeros == pytest.approx(float((a == 0).double().mean()))
        small = (a.abs() <= 1e-3 * a.amax(-1, keepdim=True)).double().mean()
        assert stats.small == pytest.approx(float(small)) and stats.small >= stats.zeros > 0.3
        assert stats.penalty == pytest.approx(Hoyer()(a).mean().item())
    optimizer.step()
    mean_square(model(x)).backward()
    assert handle.stats == first
    optimizer.step()
    mean_square(model(x)).backward()
    assert [s.step for s in handle.stats.values()] == [2, 2]
    assert "stack.blocks.1" in str(handle) and "step 2, weight 3" in str(handle)


def test_a_site_without_tokens() -> None:
    model = stack()
    d2d.sparsify(model, inputs(), weight=WEIGHT)
    model(inputs()[:0]).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_bf16_and_copies() -> None:
    model, x = stack().bfloat16(), inputs().bfloat16()
    handle = d2d.sparsify(model, x, weight=WEIGHT)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        mean_square(one(x)).backward()
    same(grads(twin), grads(model), 0.0)
    assert handle.stats["blocks.0"].penalty > 0.1


# Whole trainings


def test_training_makes_sparse_and_keeps_the_task() -> None:
    def train(weight: float) -> tuple[float, float]:
        torch.manual_seed(0)
        teacher = testing.Stack(1, h=16, seed=9)
        model = testing.Stack(1, h=128).train()
        model.blocks[0].act = nn.ReLU()
        x = torch.randn(512, 16)
        with torch.no_grad():
            target = teacher(x)
        handle = d2d.sparsify(model, x, weight=weight, schedule="linear_warmup", steps=400)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(400):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        mean_square(model(x)).backward()
        return float(loss), handle.stats["blocks.0"].zeros

    (plain, dense), (loss, sparse) = train(0.0), train(0.02)
    variance = 0.05
    assert sparse > dense + 0.25, (dense, sparse)
    assert loss < plain + variance * 0.1, (plain, loss)


def _trainer(model: nn.Module, folder: Any, **given: Any) -> Any:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    import transformers

    ids = torch.randint(5, testing.VOCABULARY, (8, 17))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    args = transformers.TrainingArguments(
        str(folder), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **given
    )
    return transformers.Trainer(model, args, train_dataset=rows), ids


@pytest.mark.parametrize("accumulate", [1, 4])
def test_trainer(tmp_path: Any, accumulate: int) -> None:
    case = testing.tiny("llama")
    model = case.model
    plain = copy.deepcopy(model).train()
    handle = d2d.sparsify(model, case.inputs, weight=WEIGHT)
    trainer, ids = _trainer(
        model, tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0,
        per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    trainer.train()
    assert handle.steps == 1 and len(handle.stats) == 2
    wanted = explicit(plain, FAMILIES["llama"](plain), lambda: plain(ids, labels=ids).loss)
    before = dict(plain.named_parameters())
    moved = {n: (before[n] - p).detach() for n, p in model.named_parameters()}
    same(moved, wanted, 1e-5)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, x, target = Acts(), inputs(), inputs().flip(0)
    wanted = explicit(model, model.acts, lambda: model(x, target)["loss"])
    handle = d2d.sparsify(model, (x, target), weight=WEIGHT)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.0))
    for part, goal in zip(x.chunk(4), target.chunk(4), strict=True):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(part, goal)["loss"])
            optimizer.step()
    same(grads(model), wanted)
    assert handle.steps == 1


# Refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"penalty": "hoyr"}, "penalty is 'hoyr'; expected one of hoyer, l1"),
        ({"at": "output"}, "at is 'output'; expected one of activation"),
        ({"weight": -1.0}, "weight is -1.0; expected a finite number"),
        ({"weight": float("nan")}, "expected a finite number"),
        ({"schedule": "cosine"}, "schedule is 'cosine'; expected one of constant"),
        ({"schedule": "linear"}, "steps is None; expected the number of optimizer steps"),
        (
            {"log_every": 0},
            "log_every is 0; expected optimizer steps between two looks, an integer >= 1",
        ),
        ({"loss_scale": "auto"}, "loss_scale is a str; expected a number, a GradScaler"),
        ({"sites": {"blocks.9": 1.0}}, "No site 'blocks.9'; expected some of blocks.0, blocks.1"),
    ],
)
def test_impossible_arguments(given: dict[str, Any], message: str) -> None:
    model = stack()
    with pytest.raises(SparsifyError, match=message):
        d2d.sparsify(model, inputs(), **{"weight": 1.0, **given})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_models_and_batches_without_sites() -> None:
    with pytest.raises(SparsifyError, match="finds no feed-forward block in this call of Linear"):
        d2d.sparsify(nn.Linear(4, 4), torch.randn(2, 4), weight=1.0)
    with pytest.raises(CalibrationError, match="A batch is a int"):
        d2d.sparsify(stack(), 3, weight=1.0)


def test_a_weight_used_without_its_module() -> None:
    class Functional(testing.FFN):
        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.gelu(self.up(x))
            return x + nn.functional.linear(h, self.down.weight, self.down.bias)

    model = nn.Sequential(Functional(), testing.FFN())
    with pytest.raises(
        SparsifyError, match=r"Site 0, test_sparsify.py:\d+: the input of the module"
    ):
        d2d.sparsify(model, torch.randn(4, 16), weight=1.0)
    handle = d2d.sparsify(model, torch.randn(4, 16), weight=1.0, sites={"0": 0})
    assert [tap.site.name for tap in handle.taps] == ["1"]
    handle.remove()
    d2d.sparsify(model, torch.randn(4, 16), weight=1.0, at="preactivation")


class Gated(nn.Module):
    """down(f(gate, up)) whose form a test chooses."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.form, self.slope = form, nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.form(self.gate(x), self.up(x), self.slope))


@pytest.mark.parametrize(
    ("form", "at", "why"),
    [
        (
            lambda g, u, p: g.sigmoid() * (u * g.tanh()),
            "activation",
            "2 functions of the gate alone",
        ),
        (lambda g, u, p: torch.sigmoid(p * g) * u, "activation", "a learnable scalar"),
        (
            lambda g, u, p: torch.dropout(g.relu() * u, 0.1, False),
            "hidden",
            "has dropout before its",
        ),
    ],
)
def test_activations_out_of_reach(form: Any, at: str, why: str) -> None:
    model, x = Gated(form), torch.randn(4, 16)
    with pytest.raises(SparsifyError, match=rf"Site .*: .*{why}|Site .* {why}"):
        d2d.sparsify(model, x, weight=1.0, at=at)
    d2d.sparsify(model, x, weight=1.0, at="hidden" if at == "activation" else "activation").remove()


def test_penalties_of_the_wrong_shape() -> None:
    model, x = stack(), inputs()
    d2d.sparsify(model, x, weight=1.0, penalty=lambda a: a.mean())
    with pytest.raises(SparsifyError, match="expected one number per token, \\[24\\]"):
        mean_square(model(x)).backward()
