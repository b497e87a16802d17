"""Selection rules through the whole package: compiled graphs, numbers, refusals, artifacts, the oracle."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import d2dcompile as d2d
from d2dcompile import testing
from d2dcompile.artifact import digest_of
from d2dcompile.attachment import states
from d2dcompile.errors import ArtifactError, NoConversionError, RuleError, TauError
from d2dcompile.expr import function
from d2dcompile.kernels.gate import gate
from d2dcompile.layout import slabs
from d2dcompile.rules import RULES, sparsity_of, value_at

D, H, E = 16, 64, 8
NUMBERS = {"max": (0.2, 0.5), "top_k": (2, 5), "top_p": (0.4, 0.7)}


def batches(count=8):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(32, D, generator=draw) for _ in range(count)]


def converted(**changes):
    model = testing.Stack(2, D, H)
    config = d2d.Config(experts=E, router_width=16, router_epochs=2, **changes)
    d2d.convert(model, batches(), config, progress=False)
    return model


def compiled(model, **options):
    return torch.compile(model, backend="d2dmoe", options={"inner": "eager", **options})


def masked(model, x, scores_of=None):
    """The stack with every block dense but for neurons of dropped experts, which are set to zero."""
    for block, state in zip(model.blocks, states(model), strict=True):
        found = state.experts
        scores = F.linear(F.relu(F.linear(x, found.router1)), found.router2).abs()
        scores = scores if scores_of is None else scores_of(block, state, x)
        mask = gate.meaning(scores, state.tau_on(x.device), state.rule)
        hidden = F.gelu(block.up(x)) * mask.repeat_interleave(H // E, -1)
        x = x + block.down(hidden)
    return x


@pytest.fixture
def model():
    return converted()


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_a_compiled_model_equals_the_masked_dense_one_and_numbers_recompile_nothing(model, rule):
    x, fast = batches()[0], compiled(model, strict=True)
    fast(x)
    d2d.set_rule(model, rule, NUMBERS[rule][0])
    fast(x)  # another rule may compile anew
    d2d.measure(model, [x])
    with torch._dynamo.config.patch(error_on_recompile=True):
        shares = []
        for number in (*NUMBERS[rule], {"blocks.0": NUMBERS[rule][0]}):
            d2d.set_rule(model, rule, number)
            torch.testing.assert_close(fast(x), masked(model, x), rtol=1e-5, atol=1e-5)
            shares.append(d2d.measure(model, [x]).executed)
    assert 0 < min(shares[:2]) < max(shares[:2]) < 1
    assert min(shares[:2]) < shares[2] < max(shares[:2])


@torch.no_grad()
def test_top_k_runs_exactly_k_and_the_dense_ends_run_everything(model):
    x = batches()[0]
    exact, fast = model(x), compiled(model)
    d2d.set_rule(model, "top_k", 3)
    assert d2d.measure(model, [x]).executed == 3 / E
    for rule, number in (("top_k", E), ("top_k", 100), ("top_p", 1), ("max", 0)):
        d2d.set_rule(model, rule, number)
        assert d2d.measure(model, [x]).executed == 1
        torch.testing.assert_close(fast(x), exact, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rules_may_differ_between_sites_of_one_graph(model):
    d2d.set_rule(model, "top_k", {"blocks.0": 2})
    d2d.set_tau(model, {"blocks.1": 0.3})
    x = batches()[0]
    torch.testing.assert_close(compiled(model)(x), masked(model, x), rtol=1e-5, atol=1e-5)
    assert [state.rule for state in states(model)] == ["top_k", "max"]


@torch.no_grad()
def test_a_graph_that_layers_share_is_not_run_for_another_rule(model):
    """Blocks compiled apart share one graph: layer 1 must not run by layer 0's rule."""
    d2d.set_rule(model, "top_k", {"blocks.0": 2})
    block = torch.compile(
        lambda m, x: m(x), backend="d2dmoe", options={"inner": "eager"}, dynamic=False
    )
    x = batches()[0]
    layers = list(model.blocks)
    with torch._dynamo.config.patch(inline_inbuilt_nn_modules=True):
        block(layers[0], x)
        with pytest.raises(RuleError, match=r"top_k.*blocks\.1.*'max'.*set_rule"):
            block(layers[1], x)


@torch.no_grad()
def test_a_kept_callable_refuses_a_rule_it_was_not_compiled_for(model, monkeypatch):
    x, fast = batches()[0], compiled(model)
    fast(x)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    d2d.set_rule(model, "top_p", 0.5)
    with pytest.raises(RuleError, match="rule='max'"):
        fast(x)
    d2d.set_rule(model, "max", 0.0)
    fast(x)


@torch.no_grad()
def test_programmatic_rewriting_follows_the_rule(model):
    conversion = d2d.Conversion({s.site.name: s.experts for s in states(model)})
    d2d.set_rule(model, "top_k", 2)
    graph = torch.fx.symbolic_trace(model)
    x = batches()[0]
    torch.testing.assert_close(
        d2d.rewrite(graph, conversion)(x), masked(model, x), rtol=1e-5, atol=1e-5
    )


def test_the_reason_for_separate_ops_is_reported(model):
    d2d.set_rule(model, "top_k", 2)
    running = d2d.explain(model, batches()[0]).running
    assert all("kernels know the rule 'max', not 'top_k'" in text for text in running.values())


@pytest.mark.parametrize(
    ("rule", "value", "error", "match"),
    [
        ("top_q", 1, RuleError, "top_q.*max, top_k, top_p"),
        ("top_k", 0, RuleError, "k is 0; expected a whole number"),
        ("top_k", 2.5, RuleError, r"k is 2\.5"),
        ("top_p", 1.5, RuleError, r"p is 1\.5"),
        ("top_p", float("nan"), RuleError, "p is nan"),
        ("max", -0.1, TauError, r"tau is -0\.1"),
        ("top_k", {"block": 2}, RuleError, r"'block'.*blocks\.0, blocks\.1"),
    ],
)
def test_impossible_rules_are_refused_and_change_nothing(model, rule, value, error, match):
    d2d.set_tau(model, 0.25)
    with pytest.raises(error, match=match):
        d2d.set_rule(model, rule, value)
    assert {(state.rule, state.tau) for state in states(model)} == {("max", 0.25)}


def test_a_model_without_conversion_has_no_rule():
    with pytest.raises(NoConversionError, match=r"convert\("):
        d2d.set_rule(testing.Stack(), "top_k", 2)


@torch.no_grad()
def test_set_tau_and_the_tau_option_say_what_to_do_under_another_rule(model):
    d2d.set_rule(model, "top_k", {"blocks.1": 3})
    with pytest.raises(
        TauError, match=r"blocks\.1.*'top_k' with k = 3.*set_rule\(model, 'max', tau\)"
    ):
        d2d.set_tau(model, 0.5)
    assert [state.tau for state in states(model)] == [0.0, 3.0]
    with pytest.raises(TauError, match="'top_k'"):
        compiled(model, tau=0.5)(batches()[0])


@pytest.mark.parametrize("rule", RULES)
def test_sparsity_orders_the_numbers_of_every_rule(model, rule):
    state = states(model)[0]
    state.rule = rule
    shares = []
    for step in range(11):
        state.set_value(value_at(state.rule, step / 10, E))
        assert value_at(state.rule, state.sparsity, E) == state.tau
        shares.append(state.expected_share())
    assert shares == sorted(shares, reverse=True) and shares[0] == 1
    assert value_at(rule, 0.0, E) == {"max": 0, "top_k": E, "top_p": 1}[rule]
    assert value_at(rule, 1.0, E) == {"max": 1, "top_k": 1, "top_p": 0}[rule]
    assert sparsity_of("top_k", 100, E) == 0


@pytest.mark.parametrize("rule", ["top_k", "top_p"])
def test_rule_and_number_are_stored_and_kept_when_a_conversion_fails(tmp_path, rule):
    model = converted(rule=rule, rule_value=NUMBERS[rule][0])
    dense = converted(rule=rule)
    assert all(s.expected_share() == 1 for s in states(dense))
    conversion = d2d.Conversion({s.site.name: s.experts for s in states(model)})
    conversion.save(tmp_path)
    loaded = d2d.load(tmp_path)
    assert {(e.rule, e.tau) for e in loaded.experts.values()} == {(rule, NUMBERS[rule][0])}
    other = testing.Stack(2, D, H)
    loaded.attach(other)
    assert [s.rule for s in states(other)] == [rule, rule]
    d2d.set_rule(other, rule, NUMBERS[rule][1])
    with pytest.raises(d2d.errors.CalibrationError):
        d2d.convert(other, [], progress=False)
    assert {(s.rule, s.tau) for s in states(other)} == {(rule, NUMBERS[rule][1])}


def test_files_written_before_there_were_rules_are_read_as_max(model, tmp_path):
    conversion = d2d.Conversion({s.site.name: s.experts for s in states(model)})
    conversion.save(tmp_path)
    path = tmp_path / "d2dmoe.json"
    document = json.loads(path.read_text())
    for item in document["sites"]:
        assert "rule" not in item
    for name in ("rule", "rule_value", "shared_experts", "router", "router_patience"):
        del document["config"][name]
    document["sha256"] = digest_of(document)
    path.write_text(json.dumps(document))
    loaded = d2d.load(tmp_path)
    assert {e.rule for e in loaded.experts.values()} == {"max"}
    assert loaded.config == d2d.Config()
    document["sites"][0]["rule"] = "top_q"
    document["sha256"] = digest_of(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="top_q"):
        d2d.load(tmp_path)


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_the_oracle_compares_exact_norms_at_the_cost_of_the_router(model, rule):
    def exact_scores(block, state, x):
        site = state.site
        parts = slabs(site, {role: state.weight(role) for role in site.tensors})
        hidden = function(site.activation)({"up": F.linear(x, parts["w_up"], parts["b_up"])})
        y = torch.einsum(
            "tef,efd->ted", hidden.view(-1, E, H // E), parts["w_down"].reshape(E, H // E, -1)
        )
        return y.norm(dim=-1).pow(state.experts.stats["exponent"])

    x, fast = batches()[0], compiled(model)
    d2d.set_rule(model, rule, NUMBERS[rule][0])
    before = fast(x)
    with testing.oracle(model):
        torch.testing.assert_close(fast(x), masked(model, x, exact_scores), rtol=1e-4, atol=1e-5)
        assert (fast(x) - before).abs().max() > 1e-3
        stats = d2d.measure(model, [x])
        assert "exact norms" in d2d.explain(model, x).running["blocks.0"]
    router = sum(len(x) * 16 * (D + E) for _ in range(2))
    pairs = sum(site.pairs for site in stats.sites.values())
    assert stats.macs == router + pairs * 2 * D * (H // E)
    assert torch.equal(fast(x), before)


@torch.no_grad()
def test_the_oracle_of_a_copy_leaves_the_original_alone(model):
    other = copy.deepcopy(testing.Stack(2, D, H))
    with pytest.raises(NoConversionError), testing.oracle(other):
        pass


def test_the_share_to_expect_is_that_of_the_router_not_of_the_exact_scores():
    model = testing.Stack(1)
    d2d.convert(model, [torch.randn(64, 16)], d2d.Config(router_epochs=1), progress=False)
    (state,) = states(model)
    stats = {"share@0.2": 0.6, "exact_share@0.2": 0.3, "share_top_p@0.2": 0.1}
    state.experts = replace(state.experts, stats=stats)
    d2d.set_tau(model, 0.2)
    assert state.expected_share() == pytest.approx(0.6)


def test_the_share_expected_of_top_k_is_k_of_the_experts(model) -> None:
    for k in (1, 2, E, 100):
        d2d.set_rule(model, "top_k", k)
        assert states(model)[0].expected_share() == pytest.approx(min(k, E) / E)
