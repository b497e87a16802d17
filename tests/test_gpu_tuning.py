"""Tuning runs for GPUs: the search on the cost model as a device, the store, and the device's bench."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from d2dcompile import (
    Config,
    cli,
    convert,
    gpu_candidates,
    gpu_schedules,
    gpu_trial,
    gpu_tuning,
    measure,
    set_tau,
    testing,
)
from d2dcompile.errors import TuningError
from d2dcompile.gpu_blocks import GpuSpec
from d2dcompile.gpu_candidates import modelled, ranked, text
from d2dcompile.gpu_defaults import default, of_strategy
from d2dcompile.gpu_schedules import GpuEntry, Where, bucket, choose, key
from d2dcompile.gpu_trial import DeviceBench, compiled_badly, precompile
from d2dcompile.gpu_tuning import ModelBench, Search, loads, tune
from d2dcompile.gpus import A100, H100, H200, MI300X
from d2dcompile.kernels.expert_mlp import call
from d2dcompile.kernels.native import Spec
from d2dcompile.load import Load
from d2dcompile.recording import record_masks
from d2dcompile.store import STORE
from d2dcompile.tuning import device_of

WIDE = GpuSpec(4096, 4096, 112, 128, True, "silu(gate) * up")
VIT = GpuSpec(768, 768, 24, 128, False, "gelu(up)")
TOY = GpuSpec(32, 32, 4, 16, True, "silu(gate) * up", dtype="fp32")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("D2D_CACHE", str(tmp_path))


def model_bench(spec: GpuSpec, load: Load) -> ModelBench:
    return ModelBench(H200, spec, load)


@pytest.mark.parametrize("device", [H200, A100, MI300X], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("tokens", [1, 8, 64, 512, 4096])
@pytest.mark.parametrize("spec", [WIDE, VIT], ids=["4096", "768"])
def test_search_finds_the_models_optimum(spec, tokens, device) -> None:
    load = Load(tokens, 0.1)
    search = Search(spec, load, ModelBench(device, spec, load), "full")
    winner = search.run()
    every = dict(gpu_candidates._all(spec, load, device))
    best = min(*every.values(), modelled(spec, load, device, _dense(spec, load, device)))
    assert search.times[winner] <= best * (1 + gpu_tuning.NOISE)


def _dense(spec, load, device):
    return of_strategy("dense", spec, load, device)


def test_search_believes_the_device_and_not_the_model() -> None:
    """Times up to 30 % off the model's: the winner is the fastest of all that were timed."""
    load = Load(4096, 0.1)
    search = Search(WIDE, load, ModelBench(H200, WIDE, load, noise=0.3), "full")
    winner = search.run()
    assert winner != ranked(WIDE, load, H200, 12)[0]
    assert search.times[winner] == min(search.times.values())


def test_default_stays_within_noise_and_dense_always_races() -> None:
    load = Load(512, 0.1)

    class Flat(ModelBench):
        def times(self, schedules, samples):
            assert any(s.strategy == "dense" for s in schedules)
            return [1.0 if s.strategy == "dense" else 0.995 for s in schedules]

    search = Search(WIDE, load, Flat(H200, WIDE, load))
    assert search.run() == default(WIDE, load, H200, dense=False)


def test_search_ends_when_time_is_up() -> None:
    load = Load(512, 0.1)
    bench = ModelBench(H200, WIDE, load)
    Search(WIDE, load, bench, "full", until=0.0).run()
    assert bench.timed <= gpu_tuning.TIMED["full"] * gpu_tuning.SAMPLES["full"]


def test_refused_candidates_are_not_timed_and_a_refused_default_is_an_error() -> None:
    load = Load(512, 0.1)
    own = default(WIDE, load, H200, dense=False)

    class Picky(ModelBench):
        def refused(self, schedules):
            return ["spills" if s.strategy == "atomic" else None for s in schedules]

        def wrong(self, schedule):
            return "its output is not finite" if schedule.tma else None

    search = Search(WIDE, load, Picky(H200, WIDE, load))
    search.run()
    assert search.refused and not any(s.strategy == "atomic" or s.tma for s in search.times)

    class Broken(Picky):
        def wrong(self, schedule):
            return "its output is not finite" if schedule == own else None

    with pytest.raises(TuningError, match=r"512 tokens: the default schedule .* not finite"):
        Search(WIDE, load, Broken(H200, WIDE, load)).run()


def test_candidates_are_of_every_way_and_hold_default_and_dense() -> None:
    for load in (Load(1, 0.1), Load(64, 0.05), Load(4096, 0.1)):
        found = ranked(WIDE, load, H200, 12)
        assert len(found) == len(set(found)) == 12
        assert default(WIDE, load, H200, dense=False) in found
        ways = {(s.strategy, s.swap, s.tma) for s in found}
        assert {"pairs", "atomic", "dense"} <= {way[0] for way in ways} and len(ways) >= 8
        times = [modelled(WIDE, load, H200, s) for s in found]
        assert times == sorted(times)
    odd = replace(WIDE, d=4095)
    assert not any(s.tma for s in ranked(odd, Load(4096, 0.1), H200, 24))


def test_winners_are_kept_found_again_and_not_searched_twice() -> None:
    count = []

    def bench(spec, load):
        count.append(load)
        return ModelBench(H200, spec, load)

    found = tune([TOY, WIDE], CPU, progress=False, bench=bench)
    assert len(count) == len(found[TOY]) + len(found[WIDE]) == 15
    again = tune([WIDE], CPU, progress=False, bench=bench)
    assert len(count) == 15
    assert sorted(again[WIDE], key=str) == sorted(found[WIDE], key=str)
    for entry in found[WIDE]:
        load = Load(entry.tokens, entry.share)
        assert choose(WIDE, load, CPU, dense=True) == entry.schedule
        assert "dense" in entry.times and 0 < entry.roofline <= 1


def test_nothing_is_searched_when_the_budget_is_spent_and_a_later_run_goes_on() -> None:
    assert tune([WIDE], CPU, budget=-1.0, progress=False, bench=model_bench) == {WIDE: []}
    assert len(tune([WIDE], CPU, progress=False, bench=model_bench)[WIDE]) == 10


def test_a_measured_schedule_is_for_its_load_device_and_software(monkeypatch) -> None:
    load = Load(512, 0.3)
    own = default(TOY, load, H100)
    other = replace(own, per_multiprocessor=7)
    tokens, rows, union = bucket(load)
    where = Where.of(CPU)
    entry = GpuEntry(
        TOY, where.device, where.multiprocessors, where.software, tokens, rows, union, other,
        {"dense": 1.0}, 0.3, 1.0, 0.5,
    )  # fmt: skip
    STORE.add([entry])
    assert choose(TOY, load, CPU, dense=True) == other
    assert choose(TOY, Load(450, 0.31), CPU, dense=True) == other
    assert choose(TOY, Load(4096, 0.3), CPU, dense=True) != other
    assert choose(replace(TOY, size=32), load, CPU, dense=True) != other
    STORE.add([replace(entry, schedule=_dense(TOY, load, H100))])
    assert choose(TOY, load, CPU, dense=True).strategy == "dense"
    assert choose(TOY, load, CPU, dense=False).strategy != "dense"
    monkeypatch.setattr(gpu_schedules, "software", lambda: "other versions")
    gpu_schedules._choose.cache_clear()
    assert key(TOY, Where.of(CPU), bucket(load)) != entry.key


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": -1}, {"rows": 2.5}, {"schedule.strategy": "fast"}, {"schedule.swap": 1},
        {"schedule.up.block_m": "16"}, {"spec.experts": 0}, {"more": 1},
        {"schedule.strategy": "decode", "tokens": 4096},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_entries_are_refused(change) -> None:
    tune([TOY], CPU, progress=False, bench=model_bench)
    document = json.loads(STORE.path.read_text())
    for name, value in change.items():
        place = document["entries"][0]
        *path, last = name.split(".")
        for part in path:
            place = place[part]
        place[last] = value
    STORE.path.write_text(json.dumps(document))
    with pytest.raises(TuningError, match=r"Delete it and tune again|expected one of"):
        STORE.read()


@pytest.mark.parametrize("tokens", [1, 64, 512])
def test_a_share_of_nothing_means_one_expert_a_token(tokens) -> None:
    """What is expected at tau = 1: the expert with the largest score always runs."""
    found = choose(TOY, Load(tokens, 0.0), CPU, dense=True)
    assert found == choose(TOY, Load(tokens, 1 / TOY.experts), CPU, dense=True)
    assert all(load.share >= 1 / TOY.experts for load in loads(TOY, "full"))


def test_dtypes_of_commands_reach_the_kernels(capsys, monkeypatch) -> None:
    """fp16 has kernels on GPUs only: no command takes it for another dtype."""
    assert cli.main(["tune", "64x256 relu(up) fp16", "--device", "cpu"]) == 2
    assert cli.main(["bench", "64x256 relu(up)", "--dtype", "fp16"]) == 2
    assert "asked for float16" in capsys.readouterr().err
    seen = []
    monkeypatch.setattr(gpu_trial, "precompile", lambda spec, *_: seen.append(spec.dtype))
    monkeypatch.setattr(cli, "print_compiled", lambda done, as_json: None)
    monkeypatch.setitem(gpu_tuning.LOADS, "quick", ((1,), (0.1,)))
    for shape in ("64x256 relu(up) fp16", "64x256 relu(up) bf16", "64x256 relu(up)"):
        assert cli.main(["tune", shape, "--precompile-only"]) == 0
    assert seen == ["fp16", "bf16", "fp32", "bf16"]


def test_recorded_masks_give_the_loads() -> None:
    masks = torch.zeros(64, 4, dtype=torch.bool)
    masks[:, 0] = True
    masks[::2, 1] = True
    found = {load.tokens: load for load in loads(TOY, "quick", {TOY: masks})}
    assert found[1].share == found[1].used == pytest.approx(0.375)
    assert found[8].used == found[64].used == pytest.approx(0.5)


@pytest.mark.triton
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_the_devices_own_bench_times_and_checks_every_way(tokens) -> None:
    """In the interpreter, where times mean nothing, or on a GPU."""
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = Load(tokens, 0.5)
    bench = DeviceBench(TOY, load, on)
    ways = ["pairs", "atomic", "dense"] + ["decode"] * (tokens <= 64)
    schedules = [of_strategy(way, TOY, load, H200) for way in ways]
    assert [bench.wrong(schedule) for schedule in schedules] == [None] * len(schedules)
    assert all(seconds > 0 for seconds in bench.times(schedules, 2))
    assert bench.refused(schedules) == [None] * len(schedules)


@pytest.mark.triton
def test_a_candidate_that_computes_something_wrong_is_found(monkeypatch) -> None:
    load = Load(20, 0.5)
    schedule = of_strategy("pairs", TOY, load, H200)
    bench = DeviceBench(TOY, load, CPU if not torch.cuda.is_available() else torch.device("cuda"))
    plain = call.Call.run

    def off(self, schedule):
        plain(self, schedule)
        self.y[:, 3] *= 1.01

    monkeypatch.setattr(call.Call, "run", off)
    assert "its error is" in bench.wrong(schedule)
    monkeypatch.setattr(call.Call, "run", lambda self, schedule: None)
    assert bench.wrong(schedule) == "its output is not finite"
    monkeypatch.setattr(call.Call, "run", lambda self, schedule: 1 / 0)
    assert "does not run (ZeroDivisionError" in bench.wrong(schedule)


@pytest.mark.triton
def test_candidates_are_compiled_for_a_device_that_is_not_here() -> None:
    load = Load(100, 0.2)
    good = of_strategy("pairs", TOY, load, H200)
    huge = replace(good, down=replace(good.down, block_m=256, block_n=256, warps=4))
    assert compiled_badly(TOY, 100, [good], "sm_90") == [None]
    (reason,) = compiled_badly(replace(TOY, dtype="bf16"), 100, [huge], "sm_80")
    assert reason is not None and reason.startswith("down: ")
    with pytest.raises(TuningError, match="expected one of"):
        precompile(TOY, load, "sm_3000")


def test_commands(capsys, monkeypatch) -> None:
    entries = tune([WIDE], CPU, progress=False, bench=model_bench)[WIDE]
    assert cli.main(["tune", "show"]) == 0
    printed = capsys.readouterr().out
    assert text(entries[0].schedule) in printed and "of the roofline" in printed
    assert cli.main(["tune", "show", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 10
    if not torch.cuda.is_available():
        assert cli.main(["tune", "64x256 relu(up) bf16", "--device", "cuda"]) == 2
        assert "--precompile-only" in capsys.readouterr().err
    assert cli.main(["tune", "64x256 relu(up) bf16", "--device", "tpu"]) == 2
    monkeypatch.setitem(gpu_tuning.LOADS, "quick", ((1,), (0.1,)))
    monkeypatch.setitem(gpu_tuning.COMPILED, "quick", 3)
    arguments = ["tune", "64x256 relu(up) bf16", "--precompile-only", "--target", "sm_90"]
    assert cli.main([*arguments, "--json"]) == 0
    (done,) = json.loads(capsys.readouterr().out)
    assert len(done["good"]) == 3 and not done["refused"]


def test_kinds_of_blocks_of_models_and_shapes() -> None:
    kinds = gpu_tuning.specs_of([Spec(64, 64, 4, 64, 16, False, True, "relu(up)")])
    assert kinds == [GpuSpec(64, 64, 4, 64, False, "relu(up)", "ieee", "bf16")]
    assert gpu_tuning.specs_of(kinds_of_native(), [torch.float16])[0].dtype == "fp16"
    with pytest.raises(TuningError, match="float64"):
        gpu_tuning.specs_of(kinds_of_native(), [torch.float64])


def test_a_models_own_routing_is_recorded_and_tuned_on() -> None:
    torch.manual_seed(0)
    model = testing.Stack(depth=2).eval()
    batches = [torch.randn(40, 16) for _ in range(4)]
    convert(model, batches, config=Config(experts=4), progress=False)
    set_tau(model, 0.3)
    masks = record_masks(model, batches)
    stats = measure(model, batches)
    assert {name: m.shape for name, m in masks.items()} == dict.fromkeys(stats.sites, (160, 4))
    for name, mask in masks.items():
        assert float(mask.float().mean()) == pytest.approx(stats.sites[name].executed)
    specs = gpu_tuning.specs_of(model)
    found = gpu_tuning.masks_of(model, batches, specs)
    assert len(specs) == 1 and found[specs[0]].shape == (320, 4)
    with pytest.raises(TuningError, match="converted model"):
        gpu_tuning.masks_of([], batches, specs)


def kinds_of_native() -> list[Spec]:
    return [Spec(64, 64, 4, 64, 16, False, True, "relu(up)")]


def test_device_that_is_tuned() -> None:
    assert device_of([], "cpu") == CPU
    with pytest.raises(TuningError, match="expected auto, cpu or cuda"):
        device_of([], "meta")


@pytest.mark.parametrize("device", [H200, A100, MI300X], ids=lambda gpu: gpu.name)
def test_int8_copies_are_half_the_bytes_to_the_model(device) -> None:
    """Modelled decode is up to twice as fast, and pays up to larger unions of experts."""
    int8 = replace(WIDE, int8=True)
    assert int8.block().streamed[1] == WIDE.block().down_bytes / 2 + 4 * 112 * 128
    for tokens, union in ((1, 0.2), (8, 0.3), (64, 0.5)):
        load = Load(tokens, 0.1 if tokens > 1 else 0.2, union)
        plain, copied = (
            modelled(spec, load, device, of_strategy("decode", WIDE, load, device))
            for spec in (WIDE, int8)
        )
        assert 1.3 < plain / copied < 2
    load = Load(64, 0.5, 1.0)
    assert default(WIDE, load, device).strategy != "decode"
    assert default(int8, load, device).strategy == "decode"
    assert key(int8, Where.of(CPU), bucket(load)) != key(WIDE, Where.of(CPU), bucket(load))


def test_int8_copies_are_tuned_for_few_tokens_beside_the_weights() -> None:
    native = Spec(64, 64, 4, 64, 16, False, True, "relu(up)")
    plain, int8 = gpu_tuning.specs_of([native], int8=True)
    assert int8 == replace(plain, int8=True) and gpu_tuning.specs_of([native]) == [plain]
    assert {load.tokens for load in loads(int8, "full")} == {1, 2, 8, 16, 32, 64}
    found = tune([plain, int8], CPU, progress=False, bench=model_bench)
    assert len(found[plain]) == 5 and len(found[int8]) == 3
    for entry in found[int8]:
        load = Load(entry.tokens, entry.share)
        assert choose(int8, load, CPU, dense=True) == entry.schedule
    assert {entry.spec for entry in STORE.read().values()} == {plain, int8}


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_bench_holds_int8_candidates_to_the_copy(tokens, monkeypatch) -> None:
    spec, load = replace(TOY, int8=True), Load(tokens, 0.5)
    bench = DeviceBench(spec, load, CPU)
    for strategy in ("decode", "pairs", "dense"):
        assert bench.wrong(of_strategy(strategy, spec, load, H100)) is None
    held = bench._meaning
    monkeypatch.setattr(bench, "_meaning", lambda *given: held(*given[:3], None))
    assert "its error is" in bench.wrong(of_strategy("decode", spec, load, H100))
