"""Fixtures of the tests of generated kernels."""

import pytest
import torch

from d2dcompile.kernels import device, native


@pytest.fixture(scope="session", autouse=True)
def right_bf16() -> None:
    """Triton's interpreter, where it is used, rounds bf16 as devices do."""
    if device.interpreted():
        from interpreter import use_right_bf16

        use_right_bf16()


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of tests are smaller than what is worth compiling."""
    monkeypatch.setattr(native, "SMALLEST", 0)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
