"""Schedules that were measured: the store, the tuning run, the command line, and what models make of them."""

import json
import multiprocessing
import warnings
from dataclasses import replace

import pytest
import torch

import d2dcompile as d2d
from d2dcompile import cli, schedules, testing, timing, trial, tuning
from d2dcompile.errors import DenseFallbackWarning, NoConversionError, TuningError
from d2dcompile.ir import Schedule
from d2dcompile.kernels import build, native
from d2dcompile.kernels.native import Spec
from d2dcompile.schedules import Entry
from d2dcompile.store import STORE
from d2dcompile.timing import Timing
from d2dcompile.trial import Candidate, Trial

SPEC = Spec(64, 64, 16, 16, 8, False, False, "gelu(up)")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Few copies, few tokens and a store of our own."""
    monkeypatch.setenv("D2D_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "MOST_COPIES", 2)
    monkeypatch.setattr(native, "SMALLEST", 0)
    monkeypatch.setitem(tuning.ROWS, "quick", (1, 4, 64))


def entry(spec: Spec = SPEC, schedule: Schedule | None = None, **changes) -> Entry:
    made = Entry(
        spec=spec,
        device=schedules.device(),
        threads=torch.get_num_threads(),
        kernels=schedules.kernels_version(),
        schedule=schedule or Schedule(False, 7, 64, 128, ((4, 0.5), (64, 0.25))),
        times={"1": {"packed": 1.5}},
        share=0.2,
        versions={"torch": "0"},
    )
    return replace(made, **changes)


def model_time(monkeypatch: pytest.MonkeyPatch, seconds) -> None:
    """Let times follow from the candidates' names instead of the clock."""
    monkeypatch.setattr(timing, "estimate", lambda call: 1.0)
    monkeypatch.setattr(
        timing,
        "alternate",
        lambda calls, estimates, repeats: {
            name: Timing(seconds(name), 0.0, repeats, False) for name in calls
        },
    )


def test_speedup_is_the_median_over_rounds() -> None:
    """Twice as fast, though the machine slowed down within the second round and stayed slow."""
    ours = Timing(4.0, 0.0, 3, False, (1.0, 4.0, 4.0))
    rival = Timing(2.0, 0.0, 3, False, (2.0, 2.0, 8.0))
    assert timing.speedup(rival, ours)[1] == 2.0
    calls = {"a": lambda: None, "b": lambda: sum(range(3000))}
    taken = timing.alternate(calls, {"a": 1, "b": 1}, 5)
    low, median, high = timing.speedup(taken["b"], taken["a"])
    assert low <= median <= high and median > 1
    assert len(taken["a"].rounds) == 5
    with pytest.raises(ValueError):
        timing.speedup(ours, taken["a"])


def test_an_entry_comes_back_as_it_was_and_only_for_what_it_was_measured_on() -> None:
    STORE.add([entry()])
    assert schedules.lookup(SPEC) == entry().schedule
    half = replace(SPEC, bf16=True)
    assert schedules.lookup(half) == schedules.default(half)
    for other in ({"device": "another"}, {"threads": 99}, {"kernels": "older"}):
        STORE.add([entry(replace(SPEC, d=32), **other)])
    assert schedules.lookup(replace(SPEC, d=32)) == schedules.default(SPEC)
    assert len(STORE.read(STORE.path)) == 4


def test_a_later_entry_replaces_an_earlier_one_of_the_same_key() -> None:
    STORE.add([entry()])
    STORE.add([entry(schedule=Schedule())])
    assert schedules.lookup(SPEC) == Schedule()
    assert len(STORE.read(STORE.path)) == 1


def _add_one(number: int) -> None:
    STORE.add([entry(replace(SPEC, d=number))])


def test_writers_in_several_processes_lose_nothing() -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(_add_one, range(1, 13), chunksize=1)
    assert len(STORE.read(STORE.path)) == 12


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(format=2),
        lambda d: d.pop("entries"),
        lambda d: d["entries"][0].pop("times"),
        lambda d: d["entries"][0].update(extra=1),
        lambda d: d["entries"][0]["spec"].update(d=-1),
        lambda d: d["entries"][0]["spec"].update(d="64"),
        lambda d: d["entries"][0]["schedule"].update(near=1e9),
        lambda d: d["entries"][0]["schedule"].update(decode=1),
        lambda d: d["entries"][0]["schedule"].update(break_even=[[1, 1.5]]),
        lambda d: d["entries"][0]["schedule"].update(break_even=[[4, 0.5], [1, 0.5]]),
    ],
)
def test_a_damaged_store_is_one_warning_for_models_and_an_error_for_tools(damage) -> None:
    path = STORE.add([entry()])
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(TuningError, match=r"schedules|format"):
        STORE.read(path)
    with pytest.warns(DenseFallbackWarning, match="default schedules"):
        assert schedules.lookup(SPEC) == schedules.default(SPEC)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert schedules.lookup(SPEC) == schedules.default(SPEC)


@pytest.mark.parametrize(
    ("share", "rows"), [(0.2, 0), (0.3, 64), (0.5, 64), (0.51, 4), (0.95, 4), (1.0, 4)]
)
def test_dense_from_the_tokens_where_every_larger_call_has_passed_its_break_even(
    share, rows
) -> None:
    assert Schedule(break_even=((4, 0.5), (64, 0.25))).dense_rows(share) == rows


def test_everything_runs_from_a_smaller_share_on_with_small_experts_and_on_tile_registers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half, shares = replace(SPEC, bf16=True, size=64), {}
    for processor in ("flags : avx512f avx512_bf16", "flags : avx512f amx_bf16 amx_tile"):
        monkeypatch.setattr(build, "processor", lambda processor=processor: processor)
        specs = (replace(half, bf16=False), half, replace(half, size=32))
        shares[processor] = [schedules.default(spec).break_even[0][1] for spec in specs]
        assert [schedules.default(spec).dense_rows(0.8) for spec in specs] == [
            129 if share < 0.8 else 0 for share in shares[processor]
        ]
    assert list(shares.values()) == [[0.93, 0.93, 0.85], [0.93, 0.75, 0.55]]


def test_never_dense_behind_a_break_even_of_one() -> None:
    assert Schedule(break_even=((1, 0.5), (64, 1.0))).dense_rows(1.0) == 0


def test_tuning_finds_the_optimum_of_a_time_model(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"packed": 0.9, "own weights": 1.0, "near 32768": 0.8, "far 8192": 0.7}
    times |= {"fused": 1.0, "two-phase": 0.5, "everything": 0.7}
    shares = {f"share {share:g}": share for share in tuning.SHARES}
    model_time(monkeypatch, lambda name: (times | shares).get(name, 1.0))
    found = d2d.tune([SPEC], progress=False)[SPEC].schedule
    assert (found.decode, found.near, found.far, found.fused_rows) == (False, 32768, 8192, 8)
    assert [rows for rows, _ in found.break_even] == [1, 4, 64]
    assert [share for _, share in found.break_even] == pytest.approx([0.7] * 3)
    assert schedules.lookup(SPEC) == found


def test_gains_within_the_noise_keep_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"packed": 0.99, "near 2048": 0.985, "far 262144": 0.99, "everything": 2.0}
    model_time(monkeypatch, lambda name: times.get(name, 1.0))
    found = d2d.tune([SPEC], progress=False)[SPEC].schedule
    assert replace(found, break_even=Schedule().break_even) == Schedule()
    assert all(share == 1 for _, share in found.break_even)


def test_disturbed_measurements_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "estimate", lambda call: 1.0)
    noisy = lambda calls, *_: {name: Timing(float(len(name)), 0.0, 3, True) for name in calls}  # noqa: E731
    monkeypatch.setattr(timing, "alternate", noisy)
    with pytest.warns(d2d.errors.D2DWarning, match="disturbed"):
        assert d2d.tune([SPEC], progress=False)[SPEC].schedule == schedules.default(SPEC)


def test_without_time_everything_keeps_its_default() -> None:
    found = d2d.tune([SPEC], budget=1e-9, progress=False)[SPEC]
    assert found.schedule == schedules.default(SPEC) and not found.times


def test_a_wrong_kernel_is_an_error_not_a_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Trial.kernel
    monkeypatch.setattr(Trial, "kernel", lambda *a: lambda: kernel(*a)() * 1.01)
    with pytest.raises(TuningError, match="its error is"):
        d2d.tune([SPEC], progress=False)


def test_real_times_of_all_candidates() -> None:
    found = d2d.tune([SPEC], budget=600, progress=False)[SPEC]
    assert set(found.times) == {"1", "4", "64"}
    assert all(us > 0 for times in found.times.values() for us in times.values())
    names = {"own weights", "packed", "everything", *(f"share {s:g}" for s in tuning.SHARES)}
    assert set(found.times["1"]) == names


def test_trial_runs_the_masks_it_says() -> None:
    made = Trial(SPEC)
    for candidate in (
        Candidate(Schedule()),
        Candidate(Schedule(fused_rows=0)),
        Candidate(Schedule(), True),
    ):
        assert made.wrong(candidate, 9, 0.3) is None
    some = made.kernel(Candidate(Schedule()), 9, 0.3)().clone()
    assert not torch.allclose(some, made.kernel(Candidate(Schedule(), True), 9, 0.3)())
    assert torch.allclose(made.dense(9)(), made.kernel(Candidate(Schedule()), 9, 1.0)(), atol=1e-4)


def converted():
    model = testing.Stack(depth=1, d=64, h=256)
    d2d.convert(
        model, [torch.randn(64, 64)], d2d.Config(expert_size=16, router_width=8), progress=False
    )
    return model


def test_a_model_runs_the_measured_schedule_and_the_report_says_so() -> None:
    model, x = converted(), torch.randn(5, 64)
    spec = tuning.specs_of(model)[0]
    STORE.add([entry(spec, Schedule(break_even=((3, 0.9),)))])
    d2d.set_tau(model, 0.0)
    fast = torch.compile(model, backend="d2dmoe")
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert d2d.attachment.states(model)[0].dense_rows == 3
    text = str(d2d.explain(model, x))
    assert "one kernel, 64 x 256 (16 experts) fp32" in text
    assert "dense from 3 tokens on" in text and "break-even of 0.90" in text
    copies = d2d.attachment.states(model)[0].packed_bytes
    assert copies >= 4 * 2 * 64 * 256 and f"copies of {copies / 1e6:.1f} MB" in text
    d2d.set_tau(model, 1.0)
    assert "dense from" not in str(d2d.explain(model, x))
    STORE.add([entry(spec, Schedule(break_even=((2, 0.5),)))])
    d2d.set_tau(model, 0.0)  # takes up what was measured meanwhile
    assert d2d.attachment.states(model)[0].dense_rows == 2


@pytest.mark.parametrize(
    ("two_phase", "limit"),
    [
        ({16: 0.5, 64: 0.5, 256: 0.5}, 4),
        ({16: 2.0, 64: 0.5, 256: 0.5}, 32),
        ({16: 2.0, 64: 2.0, 256: 2.0}, tuning.ALWAYS_FUSED),
        ({16: 2.0, 64: 1.01, 256: 0.99}, 128),
        ({16: 0.5, 64: 2.0, 256: 0.5}, 128),
    ],
)
def test_the_limit_of_the_fused_schedule_follows_what_is_beyond_the_noise(
    monkeypatch: pytest.MonkeyPatch, two_phase, limit
) -> None:
    run = tuning.Run(Trial(SPEC), 1, float("inf"))
    for rows, seconds in two_phase.items():
        run.times[rows] = {"fused": 1.0, "two-phase": seconds}
    monkeypatch.setattr(tuning.Run, "compare", lambda *_: True)
    run._choose_fused(list(two_phase))
    assert run.schedule.fused_rows == limit


def test_the_report_says_why_a_site_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    monkeypatch.setattr(native, "SMALLEST", 1 << 40)
    assert "separate ops, since its matrices have fewer" in str(
        d2d.explain(model, torch.randn(5, 64))
    )


def test_targets() -> None:
    model = converted()
    assert tuning.specs_of(model) == tuning.specs_of(model, [torch.float32])
    with pytest.raises(NoConversionError, match="no attached conversion"):
        d2d.tune(testing.Stack())
    with pytest.raises(TuningError, match="kernels for float32, bfloat16"):
        tuning.specs_of(model, [torch.float64])
    with pytest.raises(TuningError, match="effort"):
        d2d.tune(model, effort="huge")
    with pytest.raises(TuningError, match="no kind of block"):
        d2d.tune([])


def test_commands(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "64x1024 gelu(up) fp32", "--budget", "0.001s", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made[0]["spec"]["experts"] == 32 and not made[0]["spec"]["gated"]
    assert cli.main(["tune", "show"]) == 0
    assert "64 x 1024 (32 experts) fp32: gelu(up)" in capsys.readouterr().out
    assert cli.main(["tune", "export", str(tmp_path / "all.json")]) == 0
    (STORE.path).unlink()
    assert cli.main(["tune", "import", str(tmp_path / "all.json")]) == 0
    assert len(STORE.read(STORE.path)) == 1


def test_a_shape_is_split_as_convert_splits_it() -> None:
    model = testing.Stack(depth=1, d=64, h=1024)
    d2d.convert(model, [torch.randn(64, 64)], d2d.Config(router_epochs=1), progress=False)
    (kind,) = tuning.specs_of(model)
    asked = cli._parser().parse_args(["tune", f"64x1024 {kind.activation} fp32"])
    assert cli._target(asked)[0] == [kind]
    wider = ["tune", "64x1024 relu(up)", "--expert-size", "128", "--router-width", "16"]
    found, _ = cli._target(cli._parser().parse_args(wider))
    assert [(spec.experts, spec.size, spec.router) for spec in found] == [(8, 128, 16)] * 2


def test_bench_of_a_saved_conversion(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    model = testing.Stack(depth=2, d=64, h=256)
    config = d2d.Config(expert_size=16, router_width=8)
    d2d.convert(model, [torch.randn(64, 64)], config, progress=False).save(tmp_path / "saved")
    command = [
        "bench",
        str(tmp_path / "saved"),
        "--dtype",
        "bf16",
        "--tokens",
        "2",
        "--shares",
        "0.3",
    ]
    assert cli.main([*command, "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)
    names = {row["candidate"]: row["chosen"] for row in table["rows"]}
    assert names == {"dense eager": False, "everything": False, "fused": True, "two-phase": False}
    assert cli.main(command) == 0
    assert "x dense" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tune", "nowhere"], "neither the folder"),
        (["tune", "64x1031 gelu(up)"], "have no divisor near the expert size 32"),
        (["tune", "0x64 gelu(up)"], "nothing to compute"),
        (["tune", "64x128 unknown(up)"], "unknown"),
        (["tune", "export"], "needs the name"),
        (["tune", "import", "/nowhere.json"], "does not exist"),
        (["tune", "64x128 relu(up)", "--threads", "0"], "at least 1"),
        (["bench", "64x128 relu(up)", "--shares", "2"], "0..1"),
    ],
)
def test_command_errors_say_what_to_do(arguments, says, capsys) -> None:
    assert cli.main(arguments) == 2
    assert says in capsys.readouterr().err
