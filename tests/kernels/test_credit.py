"""credit: y unchanged, and the gradients that router scores get."""

import pytest
import torch
import torch.nn.functional as F

from d2dcompile.expr import function
from d2dcompile.fitting import RelativeLoss
from d2dcompile.kernels.credit import credit, credit_backward
from d2dcompile.kernels.dispatch import dispatch
from d2dcompile.kernels.expert_mlp import expert_mlp
from d2dcompile.kernels.gate import gate, tau_bits

EXPERTS, SIZE, WIDTH = 4, 3, 5
ACTIVATIONS = ["relu(up)", "silu(gate) * up", "p0 * tanh(p1 * up)"]
EXACT = {"rtol": 1e-9, "atol": 1e-12}


class Case:
    """A random fp64 block and a router's scores for its tokens; `args` are those of expert_mlp."""

    def __init__(self, activation: str, rows: int = 7, biases: bool = True, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) / WIDTH**0.5

        gated, hidden = "gate" in activation, EXPERTS * SIZE
        self.x = random(rows, WIDTH) * WIDTH**0.5
        self.w_up, self.w_down = random(hidden, WIDTH), random(hidden, WIDTH)
        self.w_gate = random(hidden, WIDTH) if gated else None
        self.b_up = random(hidden) if biases else None
        self.b_gate = random(hidden) if biases and gated else None
        self.b_down = random(WIDTH) if biases else None
        self.scalars = [random() for i in range(2) if f"p{i}" in activation]
        self.router = (random(6, WIDTH), random(EXPERTS, 6))
        self.activation = activation
        self.scores = self.score(*self.router)
        self.mask = gate(self.scores, tau_bits(0.5))
        self.args = (
            *(self.x, *dispatch(self.mask), self.w_up, self.w_gate, self.w_down),
            *(self.b_up, self.b_gate, self.b_down, None, self.scalars, activation),
        )
        self.y = expert_mlp(*self.args)

    def score(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return F.linear(F.relu(F.linear(self.x, first)), second).abs()

    def experts(self) -> torch.Tensor:
        """What each expert adds, [T, E, D], every one of them run."""
        values = {"up": F.linear(self.x, self.w_up, self.b_up)}
        if self.w_gate is not None:
            values["gate"] = F.linear(self.x, self.w_gate, self.b_gate)
        values.update((f"p{i}", scalar) for i, scalar in enumerate(self.scalars))
        hidden = function(self.activation)(values).view(-1, EXPERTS, SIZE)
        return torch.einsum("tef,efd->ted", hidden, self.w_down.view(EXPERTS, SIZE, WIDTH))

    def surrogate(self, scores: torch.Tensor) -> torch.Tensor:
        """The smooth output whose gradient is wanted: executed experts weighted by score over its maximum."""
        most = self.scores.amax(1, keepdim=True)
        weights = 1 + (scores - self.scores) / most  # 1 at the scores there are
        y = torch.einsum("ij,ij,ijk->ik", weights, self.mask.double(), self.experts())
        return y if self.b_down is None else y + self.b_down

    def credited(self, scores: torch.Tensor, aims: tuple[float, ...]) -> torch.Tensor:
        return credit(self.y, scores, torch.tensor(aims), *self.args)


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "bare"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scores_get_the_gradient_of_the_smooth_surrogate(activation: str, biases: bool) -> None:
    case = Case(activation, biases=biases)
    assert 0 < int(case.mask.sum()) < case.mask.numel()
    scores = case.scores.clone().requires_grad_()
    torch.testing.assert_close(case.surrogate(scores), case.y, **EXACT)  # the same value,
    grad_y = torch.randn_like(case.y)
    (ours,) = torch.autograd.grad(case.credited(scores, (1, 0, 1)), scores, grad_y)
    (smooth,) = torch.autograd.grad(case.surrogate(scores), scores, grad_y)
    torch.testing.assert_close(ours, smooth, **EXACT)  # and gradient;
    assert torch.autograd.gradcheck(case.surrogate, (scores,))  # which is what differences say
    assert ours[~case.mask].eq(0).all() and ours[case.mask].ne(0).any()


def test_router_weights_get_what_numerical_differences_of_the_surrogate_say() -> None:
    case = Case("silu(gate) * up")
    router = [w.clone().requires_grad_() for w in case.router]
    assert torch.autograd.gradcheck(lambda *w: case.surrogate(case.score(*w)), router)
    grad_y = torch.randn_like(case.y)
    ours = torch.autograd.grad(case.credited(case.score(*router), (2, 0, 1)), router, grad_y)
    smooth = torch.autograd.grad(case.surrogate(case.score(*router)), router, 2 * grad_y)
    for one, other in zip(ours, smooth, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_fit_is_the_gradient_of_the_routers_own_loss(activation: str) -> None:
    case, exponent = Case(activation), 0.75
    scores = case.scores.clone().requires_grad_()
    (ours,) = torch.autograd.grad(case.credited(scores, (0, 3, exponent)).sum(), scores)
    goal = case.experts().norm(dim=-1) ** exponent
    (wanted,) = torch.autograd.grad(3 * RelativeLoss.of(goal)(scores, goal), scores)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-8)  # norms are fp32
    (both,) = torch.autograd.grad(case.credited(scores, (1, 3, exponent)).sum(), scores)
    (task,) = torch.autograd.grad(case.credited(scores, (1, 0, exponent)).sum(), scores)
    torch.testing.assert_close(both, ours + task, **EXACT)


def test_y_and_its_own_gradient_pass_unchanged() -> None:
    case = Case("relu(up)")
    y = case.y.clone().requires_grad_()
    scores = case.scores.clone().requires_grad_()
    out = credit(y, scores, torch.tensor([1.0, 1.0, 1.0]), *case.args)
    assert torch.equal(out, y)
    grad_y = torch.randn_like(y)
    (passed,) = torch.autograd.grad(out, y, grad_y)
    assert torch.equal(passed, grad_y)


def test_a_row_of_zero_scores_gets_no_task_gradient_and_stays_finite() -> None:
    case = Case("relu(up)")
    case.scores[3] = 0
    scores = case.scores.clone().requires_grad_()
    (ours,) = torch.autograd.grad(case.credited(scores, (1, 1, 1)).sum(), scores)
    (task,) = torch.autograd.grad(case.credited(scores, (1, 0, 1)).sum(), scores)
    assert ours.isfinite().all() and task[3].eq(0).all()


@pytest.mark.parametrize("rows", [7, 0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_registration(activation: str, rows: int) -> None:
    case = Case(activation, rows)
    aims = torch.tensor([1.0, 1.0, 1.0])
    y, scores = (t.detach().clone().requires_grad_() for t in (case.y, case.scores))
    torch.library.opcheck(credit.overload, (y, scores, aims, *case.args))
    torch.library.opcheck(
        credit_backward.overload, (torch.ones_like(case.y), case.scores, aims, *case.args)
    )


def test_a_token_without_a_target_weighs_no_more_than_others() -> None:
    goal = torch.tensor([[1.0, 0.2, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
    scores = torch.tensor([[0.6, 0.4, 0.3, 0.2]] * 2)
    slope = RelativeLoss.of(goal).slope(scores, goal)
    assert slope[0, 0] < 0 and slope[1, 0] < 0  # both want the first expert,
    assert slope[1, 1:].gt(0).all() and slope.abs().max() < 1  # the second nothing else
