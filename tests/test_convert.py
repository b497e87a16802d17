"""convert, attach, detach and set_tau: the function stays, the artifact is repeatable, errors are typed."""

import copy
import warnings

import pytest
import torch
from torch import nn

import d2dcompile as d2d
from d2dcompile import testing
from d2dcompile.attachment import states
from d2dcompile.errors import CalibrationError, CalibrationWarning, ConfigError, PlanError, TauError
from d2dcompile.sample import Sample

QUICK = d2d.Config(router_epochs=1, expert_size=8)


def batches(count: int = 4, rows: int = 64, d: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, d, generator=generator) for _ in range(count)]


def convert(model: nn.Module, data=None, **config) -> d2d.Conversion:
    chosen = d2d.Config(**{"router_epochs": 1, "expert_size": 8, **config})
    return d2d.convert(model, batches() if data is None else data, chosen, progress=False)


def test_conversion_permutes_in_place_and_keeps_names_function_and_storage() -> None:
    model = testing.Stack()
    before = copy.deepcopy(model)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    conversion = convert(model)
    x = torch.randn(8, 16)
    assert torch.allclose(model(x), before(x), atol=1e-6)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    experts = conversion.experts["blocks.0"]
    up, old = model.blocks[0].up.weight, before.blocks[0].up.weight
    assert torch.equal(up, old[experts.permutation])
    assert torch.equal(
        model.blocks[0].down.weight, before.blocks[0].down.weight[:, experts.permutation]
    )
    assert model.blocks[0].down.weight.t().is_contiguous()  # neuron-major behind the same shape
    assert sorted(experts.permutation.tolist()) == list(range(64))
    assert list(model.state_dict()) == list(before.state_dict())


@pytest.mark.parametrize("family", testing.FAMILIES)
def test_detach_restores_every_bit_and_layout(family: str) -> None:
    case = testing.tiny(family)
    before = copy.deepcopy(case.model)
    convert(case.model, [case.inputs])
    assert len(states(case.model)) == case.blocks
    d2d.detach(case.model)
    assert states(case.model) == []
    for (name, ours), theirs in zip(
        case.model.named_parameters(), before.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert ours.stride() == theirs.stride(), name


def test_attach_to_dense_permuted_and_cast_weights() -> None:
    model = testing.Stack()
    dense = copy.deepcopy(model)
    conversion = convert(model)
    permuted = testing.Stack()
    permuted.load_state_dict(model.state_dict())  # a checkpoint saved after converting
    half = copy.deepcopy(dense).to(torch.bfloat16)  # the same checkpoint loaded in another dtype
    x = torch.randn(8, 16)
    for fresh in (copy.deepcopy(dense), permuted, half):
        conversion.attach(fresh)
        assert len(states(fresh)) == 2
        expected = dense if fresh is not half else copy.deepcopy(dense).to(torch.bfloat16)
        given = x.to(next(fresh.parameters()).dtype)
        assert torch.allclose(fresh(given), expected(given), atol=2e-2 if fresh is half else 1e-6)
    assert torch.equal(permuted.blocks[0].up.weight, model.blocks[0].up.weight)


def test_same_seed_same_conversion_and_other_seed_another() -> None:
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(made))  # the surroundings' random state must not matter
        made.append(convert(testing.Stack(), seed=seed))
    first, again, other = (m.experts["blocks.1"] for m in made)
    for part in ("permutation", "router1", "router2"):
        assert torch.equal(getattr(first, part), getattr(again, part))
    assert not torch.equal(first.router1, other.router1)


def test_converting_leaves_mode_random_state_and_gradients_alone() -> None:
    model = testing.Stack().train()
    state = torch.get_rng_state()
    convert(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_converting_again_starts_from_the_dense_weights() -> None:
    model = testing.Stack()
    first = convert(model).experts["blocks.0"]
    second = convert(model).experts["blocks.0"]
    assert torch.equal(first.permutation, second.permutation)
    assert first.hashes == second.hashes


@pytest.mark.parametrize("batch", [{"x": None}, (None,), None])
def test_batches_are_mappings_tuples_or_tensors(batch) -> None:
    x = batches(1)[0]
    given = {"x": x} if isinstance(batch, dict) else (x,) if isinstance(batch, tuple) else x
    assert len(convert(testing.Stack(), [given]).experts) == 2


def test_batches_may_be_a_generator() -> None:
    assert len(convert(testing.Stack(), (b for b in batches())).experts) == 2


def test_a_batch_of_another_type_is_refused() -> None:
    with pytest.raises(
        CalibrationError, match="A batch is a str; expected what the model is called"
    ):
        convert(testing.Stack(), ["text"])


def test_no_batches_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no calibration batches; expected at least one"):
        convert(testing.Stack(), [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_before_touching_the_model(value: float) -> None:
    model = testing.Stack()
    before = copy.deepcopy(model)
    data = batches()
    data[2][5, 3] = value
    with pytest.raises(CalibrationError, match=r"Batch 2 .*NaN or infinity at site 'blocks\.0'"):
        convert(model, data)
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert states(model) == []


def test_nothing_to_convert_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"without a convertible site.*explain"):
        convert(nn.Linear(16, 16))


def test_experts_that_do_not_divide_are_refused_with_a_divisor() -> None:
    with pytest.raises(PlanError, match=r"64 hidden neurons, which 7 experts.*such as 8"):
        convert(testing.Stack(), experts=7)


def test_a_large_prime_hidden_size_stays_dense_with_its_reason() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = testing.FFN(16, 521), testing.FFN(16, 64)

        def forward(self, x):
            return self.b(self.a(x))

    model = Mixed().eval()
    conversion = convert(model)
    assert set(conversion.experts) == {"b"}
    assert "no divisor near the expert size 8" in conversion.dense["a"]
    fast = torch.compile(model, backend="d2dmoe", fullgraph=True, options={"inner": "eager"})
    assert torch.allclose(fast(torch.ones(2, 16)), model(torch.ones(2, 16)), atol=1e-5)


def test_little_data_is_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.resetwarnings()
        with pytest.warns(CalibrationWarning, match=r"saw 10 calibration tokens for 8 experts"):
            convert(testing.Stack(), [torch.randn(10, 16)])


def test_the_sample_is_bounded_uniform_and_repeatable() -> None:
    kept = []
    for size in (100, 7):
        sample = Sample(50, torch.Generator().manual_seed(0))
        rows = torch.arange(1000.0)[:, None]
        for part in rows.split(size):
            sample.add(part, part)
            assert sum(len(p[0]) for p in sample._parts) <= 75 + size
        x, targets = sample.rows()
        assert len(x) == 50 and torch.equal(x, targets) and sample.seen == 1000
        kept.append(x[:, 0])
    assert torch.equal(*kept)  # the same tokens whatever the batch sizes
    means = []
    for seed in range(40):
        sample = Sample(50, torch.Generator().manual_seed(seed))
        sample.add(torch.arange(1000.0)[:, None], torch.zeros(1000, 1))
        means.append(sample.rows()[0].mean())
    # Mean of 2,000 draws from 0..999: standard error about 6.5.
    assert abs(torch.stack(means).mean() - 499.5) < 26


def test_the_memory_budget_limits_kept_tokens() -> None:
    conversion = convert(testing.Stack(), calibration_bytes=20_000)
    assert set(conversion.experts) == {"blocks.0", "blocks.1"}


class Apart(nn.Module):
    """Blocks in graphs of their own."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stack = testing.Stack(depth)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.stack.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


def test_the_memory_budget_is_for_the_blocks_of_all_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one graph holds them or each its own: the last of three used to get as much as all."""
    kept: list[int] = []
    rows = Sample.rows
    monkeypatch.setattr(Sample, "rows", lambda self: kept.append(len(rows(self)[0])) or rows(self))
    for model in (testing.Stack(3), Apart(3)):
        convert(model, calibration_bytes=20_000)
    assert len(kept) == 6 and len(set(kept)) == 1
    assert 3 * kept[0] * 1.5 * 4 * (16 + 8) <= 20_000


def test_a_sample_restricted_on_the_way_is_the_one_that_was_so_all_along() -> None:
    rows = torch.arange(1000.0)[:, None]
    late, early = (Sample(n, torch.Generator().manual_seed(0)) for n in (100, 30))
    for i, part in enumerate(rows.split(100)):
        late.add(part, part)
        early.add(part, part)
        if i == 4:
            late.restrict(30)
            late.restrict(60)  # no looser again
    assert torch.equal(late.rows()[0], early.rows()[0]) and len(late.rows()[0]) == 30


def test_excluded_blocks_stay_dense() -> None:
    model = testing.Stack(3)
    conversion = convert(model, exclude=("*.0", "blocks.2"))
    assert list(conversion.experts) == ["blocks.1"]
    assert conversion.dense == {
        "blocks.0": "Config.exclude has '*.0'",
        "blocks.2": "Config.exclude has 'blocks.2'",
    }


class Uneven(nn.Module):
    """A graph each: a block that divides and one that does not, of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict(
            {
                "a1": nn.Linear(16, 64),
                "a2": nn.Linear(64, 16),
                "b1": nn.Linear(16, 60),
                "b2": nn.Linear(60, 16),
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block["a2"](self.block["a1"](x).relu())
        torch._dynamo.graph_break()
        return self.block["b2"](self.block["b1"](x).relu())


@pytest.mark.parametrize("clustering", ["kmeans", "coactivation"])
def test_an_excluded_block_hinders_no_other(clustering: str) -> None:
    """One of a hidden size that does not divide; patterns that overlap; a name that both blocks had."""
    both = convert(Uneven())
    assert list(both.experts) == ["block", "block.b1"]
    first, second = both.experts.values()
    assert first.router1 is not second.router1  # they read different x
    config = {"experts": 8, "expert_size": 32, "clustering": clustering}
    with pytest.raises(PlanError):
        convert(Uneven(), **config)
    left = convert(Uneven(), exclude=("block.b*", "block.b1"), **config)
    assert list(left.experts) == ["block"] and list(left.dense) == ["block.b1"]
    swapped = convert(Uneven(), exclude=("block",))
    assert list(swapped.experts) == ["block.b1"] and list(swapped.dense) == ["block"]


def test_explain_names_blocks_as_exclude_wants_them() -> None:
    """It listed "block" twice."""
    sites = d2d.explain(Uneven(), batches()[0]).sites
    assert [site.name for site in sites] == ["block", "block.b1"]


def test_a_pattern_that_excludes_nothing_is_refused_before_the_model_is_touched() -> None:
    model = testing.Stack()
    before = copy.deepcopy(model).state_dict()
    with pytest.raises(ConfigError, match=r"'block\.0'.*patterns of: blocks\.0, blocks\.1"):
        convert(model, exclude=("block.0",))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_random_clustering_is_another_split() -> None:
    a = convert(testing.Stack()).experts["blocks.0"].permutation
    b = convert(testing.Stack(), clustering="random").experts["blocks.0"].permutation
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("experts", 0, "experts is 0"),
        ("expert_size", True, "expert_size is True"),
        ("router_width", 1.5, "router_width is 1.5"),
        ("tau", 2, "tau is 2; expected a number in 0..1"),
        ("tau", float("nan"), "tau is nan"),
        ("tau", True, "tau is True"),
        ("clustering", "magic", "clustering is 'magic'"),
        ("exclude", "blocks.0", "exclude is 'blocks.0'; expected a tuple of patterns"),
        ("exclude", (1,), "exclude is"),
        ("seed", -1, "seed is -1"),
    ],
)
def test_bad_configuration_is_refused(field: str, value, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        d2d.Config(**{field: value})


def test_configuration_from_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2D_EXPERT_SIZE", "16")
    monkeypatch.setenv("D2D_TAU", "0.25")
    monkeypatch.setenv("D2D_EXPERTS", "none")
    monkeypatch.setenv("D2D_EXCLUDE", "layers.0.*, head")
    wanted = d2d.Config(expert_size=16, tau=0.25, seed=3, exclude=("layers.0.*", "head"))
    assert d2d.Config.from_env(seed=3) == wanted
    monkeypatch.setenv("D2D_EXPERT_SIZE", "many")
    with pytest.raises(ConfigError, match="D2D_EXPERT_SIZE is 'many'; expected an integer"):
        d2d.Config.from_env()
    monkeypatch.delenv("D2D_EXPERT_SIZE")
    monkeypatch.setenv("D2D_EXPRT_SIZE", "16")
    with pytest.raises(ConfigError, match=r"Unknown variable D2D_EXPRT_SIZE.*D2D_EXPERT_SIZE"):
        d2d.Config.from_env()


def test_set_tau_refuses_and_then_changes_nothing() -> None:
    model = testing.Stack()
    with pytest.raises(TauError, match="has no attached conversion"):
        d2d.set_tau(model, 0.1)
    convert(model)
    for bad in (-0.1, 1.1, float("nan"), "0.1", True, None):
        with pytest.raises(TauError, match=r"expected a finite number in 0\.\.1"):
            d2d.set_tau(model, {"blocks.0": 0.5, "blocks.1": bad})
    with pytest.raises(TauError, match=r"No site 'block'; expected one of blocks\.0, blocks\.1"):
        d2d.set_tau(model, {"blocks.0": 0.5, "block": 0.5})
    assert [state.tau for state in states(model)] == [0.0, 0.0]


def test_states_do_not_keep_a_model_alive() -> None:
    import gc
    import weakref

    from d2dcompile import attachment

    model = testing.Stack()
    convert(model)
    torch._dynamo.reset()
    weak = weakref.ref(model)
    keys = {id(block.down.weight) for block in model.blocks}
    assert keys <= set(attachment._STATES)
    del model
    gc.collect()
    assert weak() is None
    assert keys.isdisjoint(attachment._STATES)


@pytest.mark.parametrize("family", ["bert", "gpt2", "phi3"])
def test_a_checkpoint_saved_after_converting_is_an_ordinary_dense_one(
    family: str, tmp_path
) -> None:
    """Whoever loads it without this package gets the dense model; with it, the experts attach."""
    case = testing.tiny(family)
    dense = copy.deepcopy(case.model)
    conversion = convert(case.model, [case.inputs])
    case.model.save_pretrained(tmp_path)
    loaded = type(case.model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        exact = testing.output(dense(**case.inputs))
        assert torch.allclose(testing.output(loaded(**case.inputs)), exact, atol=1e-5)
        conversion.attach(loaded)
        fast = torch.compile(loaded, backend="d2dmoe", options={"inner": "eager"})
        assert torch.allclose(testing.output(fast(**case.inputs)), exact, atol=1e-5)


def test_a_failed_conversion_keeps_the_one_attached_before() -> None:
    model = testing.Stack()
    convert(model)
    d2d.set_tau(model, 0.5)
    x = torch.randn(8, 16)
    fast = torch.compile(model, backend="d2dmoe", options={"inner": "eager"})
    with torch.no_grad():
        before = fast(x)
        with pytest.raises(CalibrationError):
            convert(model, [torch.full((4, 16), float("nan"))])
        with pytest.raises(d2d.errors.ConversionMismatchError):
            convert(testing.Stack(seed=1)).attach(model)
        assert [state.tau for state in states(model)] == [0.5, 0.5]
        assert torch.equal(fast(x), before)


class Shaped(nn.Module):
    """A residual block given as a function, with its parts."""

    def __init__(self, run, **parts) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.run(self, x)


def interleaved() -> nn.Module:
    def run(m, x):
        u = m.gate_up(x)
        return m.down(torch.sigmoid(u[..., ::2]) * u[..., 1::2])

    return Shaped(run, gate_up=nn.Linear(16, 128), down=nn.Linear(64, 16))


def tied() -> nn.Module:
    linear = torch.nn.functional.linear
    weight = nn.Parameter(torch.randn(64, 16))
    return Shaped(lambda m, x: linear(torch.relu(linear(x, m.w)), m.w.t()), w=weight)


def convolutions() -> nn.Module:
    return Shaped(
        lambda m, x: m.down(torch.relu(m.up(x))), up=nn.Conv2d(16, 64, 1), down=nn.Conv2d(64, 16, 1)
    )


def buffer_in_activation() -> nn.Module:
    def run(m, x):
        hidden = torch.relu(m.up(x))
        return m.down(hidden * m.beta + m.s * hidden * hidden)

    scale = nn.Parameter(torch.tensor(0.3))
    model = Shaped(run, up=nn.Linear(16, 64), down=nn.Linear(64, 16), s=scale)
    model.register_buffer("beta", torch.tensor(0.7))
    return model


@pytest.mark.parametrize("make", [interleaved, tied, convolutions, buffer_in_activation])
def test_unusual_layouts_convert_save_load_train_and_detach(make, tmp_path) -> None:
    """Each is exact at tau = 0, its gradients are, its artifact loads, and detach restores each bit."""
    torch.manual_seed(0)
    model = make().double().eval()
    shape = (4, 16, 5, 5) if make is convolutions else (40, 16)
    x = torch.randn(shape, dtype=torch.float64)
    before = copy.deepcopy(model)
    conversion = convert(model, [x])
    (site,) = (experts.site for experts in conversion.experts.values())
    assert site.interleaved is (make is interleaved)
    conversion.save(tmp_path / "saved")
    loaded = d2d.load(tmp_path / "saved")
    other = copy.deepcopy(before)
    loaded.attach(other)
    for converted in (model, other):
        torch._dynamo.reset()
        fast = torch.compile(converted, backend="d2dmoe", options={"inner": "eager"})
        expected, found = before(x), fast(x)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        assert torch.allclose(converted(x), expected, rtol=0, atol=1e-12)
        ours = torch.autograd.grad(found.square().sum(), list(converted.parameters()))
        dense = torch.autograd.grad(converted(x).square().sum(), list(converted.parameters()))
        for o, e in zip(ours, dense, strict=True):
            assert torch.allclose(o, e, rtol=0, atol=1e-10)
    d2d.set_tau(model, 0.9)
    assert d2d.measure(model, [x]).executed < 1
    assert not torch.allclose(
        torch.compile(model, backend="d2dmoe", options={"inner": "eager"})(x), before(x)
    )
    d2d.detach(model)
    for (name, mine), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride(), name


def test_a_hidden_size_without_a_near_divisor_gets_the_largest_below() -> None:
    """HF's own tiny configurations have 37 hidden neurons, a prime."""
    experts = convert(testing.Stack(1, h=37)).experts["blocks.0"]
    assert (experts.plan.experts, experts.plan.expert_size) == (37, 1)
    experts = convert(testing.Stack(1, h=2 * 37), expert_size=8).experts["blocks.0"]
    assert (experts.plan.experts, experts.plan.expert_size) == (37, 2)


def test_a_batch_without_tokens_for_a_site_is_no_error() -> None:
    """Audio tokens have a block of their own in some models, which most batches do not run."""
    assert convert(testing.Stack(), [torch.randn(0, 16), *batches()]).experts


def test_a_site_that_no_token_reaches_stays_dense_with_its_reason() -> None:
    class Audio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.audio = testing.FFN(), testing.FFN()

        def forward(self, x):
            return self.text(x).sum() + self.audio(x[:0]).sum()

    conversion = convert(Audio().eval())
    assert set(conversion.experts) == {"text"}
    assert conversion.dense == {"audio": "no calibration token reached it"}
    with pytest.raises(CalibrationError, match=r"blocks\.0: no calibration token reached it"):
        convert(testing.Stack(1), [torch.randn(0, 16)])
