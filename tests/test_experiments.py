"""The experiments' laboratory: emulated rivals are exact and cost what they say; trainings resume."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import d2dcompile as d2d
from d2dcompile import testing
from d2dcompile.attachment import states

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
from experiments import lab, vit  # noqa: E402
from experiments.lab import baselines, report  # noqa: E402
from experiments.lab.steps import key_of  # noqa: E402
from experiments.lab.teal import _Quantiles, _spread  # noqa: E402

D, H, E, R, T = 16, 64, 8, 4, 40
CPU = torch.device("cpu")
CONFIG = d2d.Config(experts=E, router_width=R, router_epochs=2)


class Regression(nn.Module):
    """Blocks with dropout, called with x and a target, as tasks' models are with their batches."""

    def __init__(self, hidden: int = H) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.stack = testing.Stack(2, d=D, h=hidden)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        return self.stack(self.dropout(x))


def batch(seed: int, rows: int = T) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, D, generator=generator)
    return {"x": x, "target": x.roll(1, -1)}


def error(call, batches) -> dict[str, float]:
    errors = [(call(**b) - b["target"]).square().mean().item() for b in batches]
    return {"error": sum(errors) / len(errors)}


def task() -> lab.Task:
    return lab.Task(
        name="toy",
        settings={"seed": 0},
        model=lambda hidden: Regression(hidden or H),
        train=lambda seed, step: batch(100 * seed + step),
        calibration=[batch(900 + i, 64) for i in range(4)],
        validation=[batch(950)],
        test=[batch(960), batch(961, 24)],
        loss=lambda model, b: (model(**b) - b["target"]).square().mean(),
        quality=error,
        metrics={"error": False},
    )


def gated() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    case = testing.tiny("llama")
    return case.model.eval(), dict(case.inputs)


def outputs(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.fixture
def model() -> Iterator[nn.Module]:
    made = Regression().eval()
    d2d.convert(made, task().calibration, CONFIG, progress=False)
    yield made
    d2d.detach(made)


def test_rivals_that_keep_everything_are_the_dense_model_bit_for_bit(model: nn.Module) -> None:
    """And cost what it costs, plus their routers."""
    inputs = batch(1)
    exact = outputs(model, inputs)
    blocks = lab.blocks_of(model, inputs)
    routers = lab.fit_moefication(model, blocks, task().calibration, width=R, epochs=1)
    router = R * (D + E) / (2 * D * H)
    rivals = {
        "nothing": (iter([(0.0, lab.Rule())]), 1.0),
        "static": (lab.static_topk(model, [1.0]), 1.0 + router),
        "moefication": (lab.moefication(model, routers, [1.0]), 1.0 + router),
        "oracle": (lab.oracle(model, [0.0]), 1.0),
        "teal": (lab.teal(model, blocks, task().calibration, [0.0]), 1.0),
        "wina": (lab.wina([1.0]), 1.0),
    }
    for name, (rules, cost) in rivals.items():
        for _, rule in rules:
            with lab.emulate(blocks, rule) as tally:
                found = outputs(model, inputs)
            assert torch.equal(found, exact), name
            assert tally.cost == pytest.approx(cost, rel=1e-12), name
    assert torch.equal(outputs(model, inputs), exact)  # hooks are gone


def test_emulated_tau_is_what_the_library_runs_and_counts(model: nn.Module) -> None:
    """The same masks, so static top-k and the true norms are emulated by what is checked here."""
    rule = lab.Threshold(*baselines.attached_scores(model))
    rule.tau = 0.4
    t = task()
    emulated = lab.emulated(t, model, CPU, [(0.4, rule)])[0]
    library = lab.dynamic(t, model, CPU, [0.4])[0]
    assert 0.2 < library.cost < 0.95
    assert emulated.cost == pytest.approx(library.cost, rel=1e-9)
    assert emulated.model_cost == pytest.approx(library.model_cost, rel=1e-9)
    assert emulated.quality["error"] == pytest.approx(library.quality["error"], rel=1e-5)


def test_static_topk_runs_k_experts_of_each_token(model: nn.Module) -> None:
    """Against a sum over the chosen experts' slabs, by hand."""
    inputs = batch(2)
    _, rule = next(lab.static_topk(model, [3 / E]))
    block, state = model.stack.blocks[0], states(model)[0]
    x = inputs["x"]
    router1, router2 = state.experts.router1, state.experts.router2
    chosen = ((x @ router1.T).relu() @ router2.T).abs().topk(3, dim=-1).indices
    hidden = block.act(block.up(x))
    wanted = torch.zeros(T, D, dtype=torch.float64)
    for token in range(T):
        for expert in chosen[token].tolist():
            at = slice(expert * H // E, (expert + 1) * H // E)
            wanted[token] += hidden[token, at].double() @ block.down.weight[:, at].T.double()
    wanted += block.down.bias.double()
    blocks = lab.blocks_of(model, inputs)[:1]
    seen: list[torch.Tensor] = []
    hook = block.down.register_forward_hook(lambda module, args, output: seen.append(output))
    with lab.emulate(blocks, rule) as tally:
        outputs(model, inputs)
    hook.remove()
    assert (seen[0].double() - wanted).abs().max() < 1e-5
    assert tally.macs[blocks[0].site.name] == T * (3 * 2 * D * H // E + R * (D + E))


def test_costs_of_dropped_channels_by_hand() -> None:
    """A gated block: two matrices of kept inputs, then one of kept hidden values; 2 D H + D H dense."""
    net, inputs = gated()
    blocks = lab.blocks_of(net, inputs)
    site = blocks[0].site
    rows = inputs["input_ids"].numel()
    assert blocks[0].dense_macs == 3 * site.d_model * site.d_hidden
    for share, rule in lab.wina([0.5]):
        with lab.emulate(blocks, rule) as tally:
            outputs(net, inputs)
        x, h = round(share * site.d_model), round(share * site.d_hidden)
        assert tally.macs[site.name] == rows * (2 * x * site.d_hidden + h * site.d_model)


def test_teal_keeps_what_exceeds_its_quantiles() -> None:
    """Uniform halves keep a half of either tensor; greedy costs the same and errs no more."""
    net, inputs = gated()
    blocks = lab.blocks_of(net, inputs)
    exact, errors = outputs(net, inputs), {}
    for greedy in (False, True):
        ((_, rule),) = lab.teal(net, blocks, [inputs], [0.5], greedy=greedy)
        with lab.emulate(blocks[:1], rule) as tally:
            errors[greedy] = (outputs(net, inputs) - exact).norm().item()
        assert tally.cost == pytest.approx(0.5, abs=0.03)
        assert errors[greedy] > 0
    assert errors[True] <= 1.05 * errors[False]


def test_wina_is_topk_of_input_times_column_norm() -> None:
    net, inputs = gated()
    block = lab.blocks_of(net, inputs)[0]
    _, rule = next(lab.wina([0.25]))
    x = torch.randn(5, block.site.d_model)
    mask = rule.inputs(block, "up", x)
    scores = x.abs() * block.ups["up"].weight.detach().norm(dim=0)
    for row in range(5):
        kept = set(mask[row].nonzero().flatten().tolist())
        assert kept == set(scores[row].topk(round(0.25 * block.site.d_model)).indices.tolist())


def test_zeros_cost_rivals_nothing() -> None:
    """What adds nothing is skipped, and the output stays: by WINA of inputs, by the bound of experts."""
    net = testing.Stack(1, d=D, h=H)
    net.blocks[0].act = nn.ReLU()
    with torch.no_grad():
        net.blocks[0].up.weight[: H // 2] -= 2.0  # with inputs above zero these stay silent
    x = torch.rand(T, D)
    d2d.convert(net, [x], CONFIG, progress=False)
    exact, blocks = net(x), lab.blocks_of(net, {"x": x})
    for rules, most in ((lab.wina([1.0]), 0.9), (lab.oracle(net, [0.0]), 0.9)):
        _, rule = next(rules)
        with lab.emulate(blocks, rule) as tally:
            torch.testing.assert_close(net(x), exact)
        assert tally.cost < most


def test_teal_finds_the_largest_of_more_values_than_fp32_counts() -> None:
    """24 batches of 2^20 values: the place of the last one, rounded as fp32, was one past the end."""
    recorder = _Quantiles()
    recorder.found["block", "x"] = [torch.zeros(24 * 2**20 - 1), torch.ones(1)]
    assert recorder.table()["block", "x"][-1] == 1


def test_teal_sees_every_neuron_and_every_batch() -> None:
    block = lab.Block(lab.blocks_of(*gated())[0].site, {}, nn.Linear(1, 1))
    h = torch.zeros(4096, 1280)
    h[:, ::5] = 1.0  # a stride of values that divides the width would see these alone
    recorder = _Quantiles()
    recorder.hidden(block, h, h)
    assert recorder.table()[block.site.name, "h"].mean() == pytest.approx(0.2, abs=0.01)
    batches = [{"x": torch.full((8, 64), float(i)), "scale": 2} for i in range(40)]
    found = _spread(batches, 8 * 64)
    assert found["x"].shape == (16, 64) and found["scale"] == 2
    assert found["x"][:, 0].tolist() == sorted(set(found["x"][:, 0].tolist()))
    ragged = [{"x": torch.zeros(8, 10 + i)} for i in range(5)]
    assert _spread(ragged, 80)["x"].shape[1] == 12


def test_training_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """Weights, losses and the penalty's schedule, with dropout, after two interruptions."""
    recipe = lab.Recipe(
        12, rate=1e-2, looks=4, sparsity={"weight": 0.5, "penalty": "hoyer", "schedule": "linear"}
    )
    whole = lab.trained(lab.Steps(tmp_path / "a"), "m", task(), recipe, Regression, CPU)
    broken = lab.Steps(tmp_path / "b", save_every=0.0)
    settings = lab.settings_of(task(), recipe)
    for stop in (4, 7):

        def watch(step: int, loss: float, stop: int = stop) -> None:
            if step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            partial = broken.partial("m", settings)
            lab.train(task(), Regression(), recipe, CPU, partial, watch)
        assert partial.load()["step"] == stop + 1
    resumed = lab.trained(broken, "m", task(), recipe, Regression, CPU)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    histories = [
        json.loads(next((tmp_path / x).glob("m-history-*.json")).read_text()) for x in "ab"
    ]
    assert histories[0]["looks"] == histories[1]["looks"] and len(histories[0]["looks"]) == 4
    assert not list((tmp_path / "b").glob("*.partial"))


def test_other_settings_are_another_step(tmp_path: Path) -> None:
    steps, made = lab.Steps(tmp_path), []

    def value(settings: dict) -> dict:
        return steps.value("x", settings, lambda: made.append(settings) or {"n": len(made)})

    assert [value({"a": 1}), value({"a": 2}), value({"a": 1})] == [{"n": 1}, {"n": 2}, {"n": 1}]
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": 3})
    with pytest.raises(ValueError):
        key_of({"a": math.nan})


def curve(*pairs: tuple[float, float]) -> list[lab.Point]:
    return [lab.Point(0.0, cost, cost, {"q": value}) for cost, value in pairs]


def test_budgets_and_critical_costs_are_read_off_between_points() -> None:
    points = curve((1.0, 0.9), (0.5, 0.9), (0.3, 0.85), (0.2, 0.5))
    assert lab.at_budget(points, 0.4, "q") == pytest.approx(0.875)
    assert lab.at_budget(points, 0.1, "q") is None
    assert lab.at_budget(points, 2.0, "q") == 0.9
    assert lab.critical(points, 0.9, "q", True) == pytest.approx(0.5 - 0.2 * 0.009 / 0.05)
    assert lab.critical(points, 0.95, "q", True) is None
    dips = curve((1.0, 0.9), (0.8, 0.5), (0.4, 0.9))  # better again below does not count
    assert lab.critical(dips, 0.9, "q", True) > 0.9
    rises = curve((1.0, 2.0), (0.5, 2.0), (0.25, 3.0))  # lower is better
    assert lab.critical(rises, 2.0, "q", False) == pytest.approx(0.5 - 0.25 * 0.02)
    found = lab.summary({"m": [points, dips]}, [{"q": 0.9}] * 2, {"q": True})["m"]["q"]
    assert found["critical"]["mean"] == pytest.approx(sum(found["critical"]["values"]) / 2)
    mean = lab.mean_curve([points, dips], "q")
    assert [point.cost for point in mean] == [0.4, 0.5, 0.8, 1.0]
    assert mean[1].quality["q"] == pytest.approx((0.9 + 0.8) / 2)
    assert found["critical_of_mean"] == lab.critical(mean, 0.9, "q", True)
    assert found["budgets"]["0.1"] is None and found["budgets"]["0.5"]["max"] == 0.9


def test_gaps_are_paired_by_seed_and_turn_where_lower_is_better() -> None:
    ours = [curve((1.0, 3.0), (0.1, 3.0)), curve((1.0, 5.0), (0.1, 5.0))]
    rival = [curve((1.0, 2.0), (0.1, 2.0)), curve((1.0, 6.5), (0.5, 6.5))]
    for higher, better in ((True, -0.25), (False, 0.25)):
        found = lab.summary({"a": ours, "b": rival}, [{"q": 3.0}] * 2, {"q": higher})
        gap = lab.gaps(found, "a", ["b"], "q", higher)["b"]
        assert gap["gaps"]["0.6"]["mean"] == pytest.approx(better)
        assert gap["gaps"]["0.6"]["std"] == pytest.approx(1.25 * 2**0.5)
        assert gap["gaps"]["0.2"] is None  # one seed of the rival cannot go there
        assert gap["nowhere_worse"] is not higher


def test_the_report_stands_between_its_markers_and_needs_them() -> None:
    text = f"a\n{report.BEGIN}\nold\n{report.END}\nb"
    once = report.replaced(text, "new")
    assert once == f"a\n{report.BEGIN}\nnew\n{report.END}\nb" == report.replaced(once, "new")
    with pytest.raises(ValueError, match="once each"):
        report.replaced("no markers", "new")


def test_the_report_says_where_a_method_has_fewer_seeds_or_no_cheaper_point() -> None:
    run = [lab.Point(0.0, cost, cost, {"loss": 1.0}) for cost in (1.0, 0.5)]
    worse = [lab.Point(0.0, 1.0, 1.0, {"loss": 1.0}), lab.Point(0.0, 0.2, 0.2, {"loss": 1.05})]
    curves = {"whole": [worse, worse], "once": [run]}
    result = {
        "name": "x", "title": "X", "command": "c", "seeds": [0, 1], "metrics": {"loss": False},
        "curves": {name: [[p.json() for p in r] for r in runs] for name, runs in curves.items()},
        "versions": {"processor": "p"}, "dense": [{"loss": 1.0}] * 2,
        "summary": lab.summary(curves, [{"loss": 1.0}] * 2, {"loss": False}),
    }  # fmt: skip
    rows = report.table(result).splitlines()
    assert any(row.startswith("| whole | 84 % |") for row in rows)
    assert any(row.startswith("| once | ≤ 50 % (seeds: 1) |") for row in rows)


def test_early_exit_pays_for_the_layers_and_heads_that_an_example_passes() -> None:
    sizes = vit.QUICK
    task = vit.digits(0, sizes)
    model = lab.MultiExit(vit.vit(sizes, sizes.hidden, 0), "vit.layers", vit.first_token, 32, 10)
    with torch.no_grad():
        exits = [model(**batch) for batch in task.test]
    sure = torch.cat([logits[0].softmax(-1).amax(-1) for logits in exits]).median().item()
    never, always, some = lab.early_exit(task, model, CPU, (1.1, 0.0, sure))
    tokens, head = 17, 32 * 10
    dense = sizes.layers * tokens * 2 * sizes.width * sizes.hidden
    assert never.cost == pytest.approx(1 + (sizes.layers - 1) * head / dense)
    assert always.cost == pytest.approx(1 / sizes.layers + head / dense)
    assert some.cost == pytest.approx((always.cost + never.cost) / 2, rel=0.01)
    with torch.no_grad():
        assert never.quality == pytest.approx(task.quality(model.model, task.test))
    labels = torch.cat([batch["labels"] for batch in task.test])
    first = torch.cat([logits[0].argmax(-1) for logits in exits])
    assert always.quality["accuracy"] == pytest.approx((first == labels).float().mean().item())
    whole = lab.methods.model_macs(model.model, task.test)
    one = copy.deepcopy(model.model)
    one.vit.layers = one.vit.layers[:1]
    alone = lab.methods.model_macs(one, task.test) + len(labels) * head
    assert always.model_cost == pytest.approx(alone / whole)
    assert len(model.layers) == sizes.layers  # and the model is as it was
    loss = lab.exits_task(task).loss(model, task.test[0])
    labels = task.test[0]["labels"]
    losses = [nn.functional.cross_entropy(logits, labels) for logits in model(**task.test[0])]
    assert loss.item() == pytest.approx(sum(found.item() for found in losses) / sizes.layers)


def test_other_code_converts_anew_and_the_same_code_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = lab.Steps(tmp_path)
    for code, folders in (("one", 1), ("one", 1), ("other", 2)):
        monkeypatch.setattr(lab.methods, "code", lambda code=code: code)
        lab.converted(steps, "experts", {"seed": 0}, task(), Regression(), CONFIG, CPU)
        assert len(list(tmp_path.glob("experts-*"))) == folders
    assert len(lab.code()) == 12
