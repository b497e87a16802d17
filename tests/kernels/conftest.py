"""Fixtures of the tests of generated kernels."""

import pytest
import torch

from d2dcompile.kernels import native


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
