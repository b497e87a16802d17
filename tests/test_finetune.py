"""finetune: experts and routers learn at the tau they run at, and the conversion stays true."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import d2dcompile as d2d
from d2dcompile import testing
from d2dcompile.attachment import states
from d2dcompile.errors import (
    CalibrationError,
    FinetuneError,
    NoConversionError,
    WeightsChangedError,
)

sys.path.insert(0, str(Path(__file__).parent))
import digits
import toy_jobs

QUICK = d2d.Config(router_epochs=2, expert_size=8, router_width=8)


def converted(tau: float = 0.5, depth: int = 2) -> tuple[testing.Stack, d2d.Conversion]:
    model = testing.Stack(depth)
    conversion = d2d.convert(model, [torch.randn(256, 16)], QUICK, progress=False)
    d2d.set_tau(model, tau)
    return model, conversion


def compiled(model: torch.nn.Module, inner: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(model, backend="d2dmoe", options={"inner": inner, **options})


def steps(fast: Any, parameters: Any, count: int = 3) -> None:
    """A plain loop towards y = 0, which knows nothing of experts."""
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for seed in range(count):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        fast(x).square().mean().backward()
        optimizer.step()


def test_fine_tuning_at_a_quarter_executed_recovers_most_of_the_loss() -> None:
    """Of what 25 % executed costs on held-out digits, ten epochs at that tau bring back two thirds."""
    model = digits.trained()
    seen, held = digits.data()
    batches = list(seen.x.split(250))
    dense = digits.loss(model, held), digits.accuracy(model, held)
    config = d2d.Config(expert_size=4, router_width=32, router_epochs=10)
    conversion = d2d.convert(model, batches, config, progress=False)
    d2d.fit_tau(model, batches, budget=0.25)
    fast = compiled(model, "eager")
    before = digits.loss(fast, held), digits.accuracy(fast, held)
    assert before[0] > dense[0] + 0.1 and before[1] < dense[1] - 0.03
    with d2d.finetune(model, conversion, router_lr=3e-3) as tuning:
        digits.train(model, fast, seen, 10, 1e-3)
    d2d.fit_tau(model, batches, budget=0.25)
    assert d2d.measure(model, [held.x]).executed < 0.26
    after = digits.loss(fast, held), digits.accuracy(fast, held)
    assert before[0] - after[0] > 0.66 * (before[0] - dense[0])
    assert before[1] - after[1] < 0.66 * (before[1] - dense[1])
    assert tuning.steps == 100


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("routers", ["fit", "task"])
def test_weights_and_routers_get_gradients_from_compiled_graphs(inner: str, routers: str) -> None:
    model, conversion = converted()
    with d2d.finetune(model, conversion, routers=routers, router_lr=None) as tuning:
        fast = compiled(model, inner)
        x = torch.randn(64, 16)
        fast(x).square().sum().backward()
        assert len(tuning.parameters()) == 4
        for parameter in (*model.parameters(), *tuning.parameters()):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0
        ours = [p.grad.clone() for p in tuning.parameters()]
        model.zero_grad()
        for parameter in tuning.parameters():
            parameter.grad = None
        compiled(model, "eager")(x).square().sum().backward()
        for one, other in zip(ours, tuning.parameters(), strict=True):
            torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_weights_is_that_of_the_chosen_experts_alone() -> None:
    model, conversion = converted(depth=1)
    state, x = states(model)[0], torch.randn(64, 16)
    scores = (torch.relu(x @ state.routers[0].T) @ state.routers[1].T).abs()
    mask = (scores >= 0.5 * scores.amax(1, keepdim=True)).repeat_interleave(8, 1)
    plain = copy.deepcopy(model).blocks[0]
    (plain.down(plain.act(plain.up(x)) * mask) + x).square().sum().backward()
    for routers in ("both", "fixed"):
        with d2d.finetune(model, conversion, routers=routers) as tuning:
            compiled(model)(x).square().sum().backward()
        conversion = tuning.conversion
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
        model.zero_grad()


def test_routers_step_with_the_loops_optimizer_only_where_they_learn() -> None:
    moved = {}
    for routers in ("fit", "task", "both", "fixed"):
        model, conversion = converted()
        with d2d.finetune(model, conversion, routers=routers) as tuning:
            before = [p.detach().clone() for p in tuning.parameters()]
            steps(compiled(model), model.parameters())
            pairs = zip(before, tuning.parameters(), strict=True)
            moved[routers] = [float((a - b.detach()).abs().max()) > 0 for a, b in pairs]
        assert tuning.steps == 3
    assert moved == {**dict.fromkeys(("fit", "task", "both"), [True] * 4), "fixed": [False] * 4}


def test_learning_fits_routers_to_experts_that_moved() -> None:
    """With "fit", scores follow the norms of changed experts; fixed routers are left behind."""
    found = {}
    x = torch.randn(512, 16)
    for routers in ("fit", "fixed"):
        model, conversion = converted(depth=1)
        tuning = d2d.finetune(model, conversion, routers=routers, router_lr=0.03)
        with torch.no_grad():  # half of the experts fall silent
            model.blocks[0].down.weight[:, :32] *= 0.01
        fast = compiled(model, "eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        for _ in range(60):
            fast(x).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[routers] = tuning.close([x]).experts["blocks.0"].stats
    assert found["fit"]["iou@0.3"] > found["fixed"]["iou@0.3"] + 0.1


def test_after_closing_the_conversion_is_that_of_the_new_weights(tmp_path: Path) -> None:
    model, conversion = converted()
    original = copy.deepcopy(model)
    with d2d.finetune(model, conversion) as tuning:
        fast = compiled(model)
        steps(fast, model.parameters())
        d2d.measure(model, [torch.randn(8, 16)])  # no error while open
    fast = compiled(model)
    x = torch.randn(32, 16)
    with torch.no_grad():
        ours = fast(x)
        assert not torch.allclose(ours, model(x), atol=1e-5)  # sparse
    tuning.conversion.save(tmp_path / "sidecar")
    d2d.detach(model)  # a checkpoint in the plain order of neurons
    fresh = testing.Stack(2, seed=9)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    d2d.load(tmp_path / "sidecar").attach(fresh)
    assert [s.tau for s in states(fresh)] == [0.5, 0.5]
    with torch.no_grad():
        torch.testing.assert_close(compiled(fresh)(x), ours, rtol=1e-5, atol=1e-6)
    with pytest.raises(d2d.errors.ConversionMismatchError):
        tuning.conversion.attach(original)


def test_edits_after_closing_are_detected_again() -> None:
    model, conversion = converted()
    tuning = d2d.finetune(model, conversion)
    steps(compiled(model), model.parameters())
    closed = tuning.close()
    assert tuning.close() is closed and tuning.routers == {}
    with torch.no_grad():
        model.blocks[1].up.weight.mul_(2)
        with pytest.raises(WeightsChangedError, match=r"blocks\.1\.up\.weight"):
            compiled(model)(torch.randn(8, 16))


def test_closing_with_batches_judges_or_refits_the_routers() -> None:
    model, conversion = converted()
    batches = [torch.randn(256, 16)]
    tuning = d2d.finetune(model, conversion, routers="fixed")
    steps(compiled(model), model.parameters())
    with pytest.raises(CalibrationError, match="no batches"):
        tuning.close(refit=True)
    kept = [r.detach().clone() for r in tuning.routers["blocks.0"]]
    judged = tuning.close(batches).experts["blocks.0"]
    assert torch.equal(judged.router1, kept[0]) and "r2" in judged.stats
    again = d2d.finetune(model, tuning.conversion).close(batches, refit=True).experts["blocks.0"]
    assert not torch.equal(again.router1, kept[0])
    assert again.stats["loss"] >= 0 and states(model)[0].experts is again
    unjudged = d2d.finetune(model, again_conversion(model)).close().experts["blocks.0"]
    assert "r2" not in unjudged.stats and "share@0.2" in unjudged.stats


def again_conversion(model: torch.nn.Module) -> d2d.Conversion:
    """A conversion of what is attached."""
    return d2d.Conversion({state.site.name: state.experts for state in states(model)})


def test_tau_may_change_while_training_and_evaluation_sees_the_routers_as_they_are() -> None:
    model, conversion = converted(0.3)
    with d2d.finetune(model, conversion) as tuning:
        fast = compiled(model, "eager")
        steps(fast, model.parameters(), 1)
        shares = []
        for tau in (0.3, 0.6):
            d2d.set_tau(model, tau)
            shares.append(d2d.measure(model, [torch.randn(64, 16)]).executed)
        assert shares[1] < shares[0]
        x = torch.randn(16, 16)
        with torch.no_grad():
            before = fast(x)
            for first, _ in tuning.routers.values():
                first.zero_()  # all scores are zero: every expert runs
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(before, model(x), atol=1e-5)


def test_what_cannot_be_fine_tuned_is_refused() -> None:
    model, conversion = converted()
    other = d2d.convert(testing.Stack(2), [torch.randn(256, 16)], QUICK, progress=False)
    for given, match in (
        ({"routers": "all"}, "routers is 'all'; expected one of fit"),
        ({"router_lr": -1.0}, "router_lr is -1.0"),
    ):
        with pytest.raises(FinetuneError, match=match):
            d2d.finetune(model, conversion, **given)
    with pytest.raises(FinetuneError, match="attached from another conversion"):
        d2d.finetune(model, other)
    with pytest.raises(NoConversionError):
        d2d.finetune(testing.Stack(2), conversion)
    with d2d.finetune(model, conversion), pytest.raises(FinetuneError, match="already"):
        d2d.finetune(model, conversion)


def test_rules_and_shared_experts_outlive_fine_tuning(tmp_path: Path) -> None:
    model = testing.Stack(2)
    batches = [torch.randn(256, 16)]
    config = d2d.Config(router_epochs=2, expert_size=8, router_width=8, shared_experts=2)
    conversion = d2d.convert(model, batches, config, progress=False)
    d2d.set_rule(model, "top_k", 3)
    with pytest.raises(FinetuneError, match=r"shared experts.*'?fixed"):
        d2d.finetune(model, conversion)
    with d2d.finetune(model, conversion, routers="fixed") as tuning:
        steps(compiled(model), model.parameters())
        after = tuning.close(batches)
    for name, experts in after.experts.items():
        assert (experts.rule, experts.tau, int(experts.shared.sum())) == ("top_k", 3.0, 2)
        assert torch.equal(experts.shared, conversion.experts[name].shared)
        assert all(value == value for value in experts.stats.values())
    after.save(tmp_path / "experts")
    assert d2d.load(tmp_path / "experts").experts["blocks.0"].rule == "top_k"
    assert d2d.measure(model, batches).executed == pytest.approx(5 / 8)  # three, beside the two


def test_routers_of_other_kinds_are_refused_what_they_are_not_made_for() -> None:
    model, batches = testing.Stack(1), [torch.randn(256, 16)]
    for kind in ("classify", "centroid"):
        config = d2d.Config(router_epochs=2, expert_size=8, router_width=8, router=kind)
        conversion = d2d.convert(model, batches, config, progress=False)
        with pytest.raises(FinetuneError, match=f"{kind}.*task"):
            d2d.finetune(model, conversion)
        tuning = d2d.finetune(model, conversion, routers="task")
        steps(compiled(model), model.parameters(), 1)
        if kind == "centroid":
            with pytest.raises(FinetuneError, match="centroids"):
                tuning.close(batches, refit=True)
        after = tuning.close(batches, refit=kind != "centroid")
        assert after.experts["blocks.0"].stats["tokens"] == 256


def test_trainer_and_a_plain_loop_give_the_same_experts_and_routers(tmp_path: Path) -> None:
    """Hugging Face's Trainer around `model.compile`; accelerate refuses backends it does not know by name."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    import transformers

    case = testing.tiny("llama")
    ids = torch.randint(5, testing.VOCABULARY, (8, 17))
    conversion = d2d.convert(case.model, [{"input_ids": ids}], QUICK, progress=False)
    other = copy.deepcopy(case.model)
    conversion.attach(other)
    for model in (case.model, other):
        d2d.set_tau(model, 0.5)
        model.compile(backend="d2dmoe", options={"inner": "eager"})
    with d2d.finetune(case.model, conversion) as ours:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, optim="sgd", learning_rate=0.1, max_grad_norm=0,
            lr_scheduler_type="constant", per_device_train_batch_size=8, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids]
        transformers.Trainer(case.model, arguments, train_dataset=rows).train()
    with d2d.finetune(other, conversion) as theirs:
        optimizer = torch.optim.SGD(other.train().parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            other(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    assert ours.steps == theirs.steps == 3
    start = testing.tiny("llama").model.state_dict()
    for (name, one), two in zip(case.model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
        assert ".mlp." not in name or not torch.equal(one.sum(0), start[name].sum(0))
    for name, experts in ours.conversion.experts.items():
        same = theirs.conversion.experts[name]
        torch.testing.assert_close(experts.router1, same.router1, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(experts.router2, same.router2, rtol=1e-3, atol=1e-5)
        assert not torch.equal(experts.router2, conversion.experts[name].router2)


def test_routers_stay_the_same_in_all_processes_of_a_distributed_run(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(toy_jobs.finetune_apart, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
