"""Op: a meaning, its implementations, and who chooses between them."""

import itertools

import pytest
import torch
from torch import Tensor

from d2dcompile.errors import KernelError
from d2dcompile.kernels.base import op
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.kernels.expert_mlp.gradient import expert_mlp_backward
from d2dcompile.kernels.gate import gate
from d2dcompile.kernels.route import route

NUMBERS = itertools.count()


@pytest.fixture
def toy(monkeypatch):
    """A fresh op that returns zeros; implementations in these tests return their own number."""
    monkeypatch.delenv("D2D_IMPL", raising=False)

    def toy(x: Tensor, n: int) -> Tensor:
        return torch.zeros_like(x)

    toy.__name__ = f"toy{next(NUMBERS)}"
    return op(version=1)(toy)


def returning(number):
    return lambda x, n: torch.full_like(x, number)


def answer(toy):
    return toy(torch.ones(2), 1)[0].item()


def test_meaning_is_the_implementation_of_last_resort(toy):
    assert list(toy.names()) == ["reference"]
    assert answer(toy) == 0


def test_earlier_implementations_are_preferred(toy):
    toy.impl("first", returning(1.0))
    toy.impl("second", returning(2.0))
    assert list(toy.names()) == ["first", "second", "reference"]
    assert answer(toy) == 1


def test_a_platform_that_says_no_is_passed_over(toy):
    toy.impl("elsewhere", returning(1.0), platform=lambda: False)
    assert answer(toy) == 0
    toy.impl("here", returning(2.0))
    assert answer(toy) == 2


def test_refused_arguments_are_passed_over(toy):
    toy.impl("odd", returning(1.0), accepts=lambda x, n: n % 2 == 1)
    assert toy(torch.ones(2), 3)[0] == 1
    assert toy(torch.ones(2), 4)[0] == 0


@pytest.mark.parametrize(
    "run",
    [lambda x: x, lambda x, n, m: x, lambda n, x: x, lambda x, k: x, lambda *args: args[0]],
    ids=["fewer", "more", "swapped", "renamed", "starred"],
)
def test_other_parameters_are_refused(toy, run):
    with pytest.raises(KernelError, match="same parameters"):
        toy.impl("wrong", run)
    assert list(toy.names()) == ["reference"]


@pytest.mark.parametrize("name", ["taken", "reference"])
def test_a_name_serves_one_implementation(toy, name):
    toy.impl("taken", returning(1.0))
    with pytest.raises(KernelError, match="already"):
        toy.impl(name, returning(2.0))


def test_user_chooses_an_implementation(toy, monkeypatch):
    toy.impl("first", returning(1.0))
    toy.impl("second", returning(2.0))
    for name, number in (("second", 2), ("reference", 0), ("first", 1)):
        monkeypatch.setenv("D2D_IMPL", f"{toy.name}:{name},gate:reference")
        assert answer(toy) == number
    monkeypatch.setenv("D2D_IMPL", "gate:reference")
    assert answer(toy) == 1


def test_a_choice_that_cannot_run_is_an_error(toy, monkeypatch):
    toy.impl("elsewhere", returning(1.0), platform=lambda: False)
    toy.impl("picky", returning(2.0), accepts=lambda x, n: False)
    for name in ("elsewhere", "picky"):
        monkeypatch.setenv("D2D_IMPL", f"{toy.name}:{name}")
        with pytest.raises(KernelError, match=f"{toy.name}:{name} does not run here"):
            answer(toy)


def test_unknown_implementation_is_an_error_that_lists_the_known(toy, monkeypatch):
    toy.impl("first", returning(1.0))
    monkeypatch.setenv("D2D_IMPL", f"{toy.name}:fast")
    with pytest.raises(KernelError, match="known: first, reference"):
        answer(toy)


def test_unknown_op_is_an_error_and_not_ignored(toy, monkeypatch):
    monkeypatch.setenv("D2D_IMPL", "expert_mpl:reference")
    with pytest.raises(KernelError, match=r"expert_mpl; known: .*expert_mlp"):
        answer(toy)


@pytest.mark.parametrize("text", ["reference", "gate:a:b", "gate=reference", ":,:"])
def test_malformed_choice_is_an_error(toy, monkeypatch, text):
    monkeypatch.setenv("D2D_IMPL", text)
    with pytest.raises(KernelError, match="D2D_IMPL"):
        answer(toy)


def test_calling_an_op_calls_what_is_registered(toy):
    assert toy.overload is getattr(torch.ops.d2d, f"{toy.name}_v1").default
    assert toy.__doc__ is toy.meaning.__doc__


@pytest.mark.parametrize("known", [gate, dispatch, route, expert_mlp, expert_mlp_backward])
def test_every_op_is_complete(known):
    """A docstring and a FLOP formula; opcheck in the ops' own tests covers fakes and gradients."""
    from torch.utils.flop_counter import flop_registry

    assert known.__doc__ and known.packet in flop_registry
    assert known.names()[-1] == "reference"
