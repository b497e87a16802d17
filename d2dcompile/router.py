"""Predict from a token which experts matter: the D2DMoE router, its exact targets and its fit.

    scores(x) = |relu(x W1^T) W2^T|          x [.., D]   W1 [R, D]   W2 [E, R]   scores [.., E]
    target[t, e] = |h_te W_e|_2 = sqrt(h_te G_e h_te^T)          G_e = W_e W_e^T [F, F]

Expert e runs on token t unless scores[t, e] < tau * max of scores[t]. Szatkowski et al. 2024,
arXiv:2310.04361; the Gram form of the target avoids the E x T x D tensor of expert outputs.

Only ratios within a row decide, and the fit uses that freedom twice. Rows are weighted by one over
their largest norm: tokens with huge outputs (the top 1 % are 60 times the median in MiniLM's layer 2)
would own a plain squared error. And targets are raised to one power per site, which keeps the order of
the experts of every token but makes one tau mean the same everywhere: at tau = LEVEL half of all
(token, expert) pairs run. With plain norms, tau .3 runs .16 to .63 of them in MiniLM's layers.

MoEfication's routers are classifiers instead (Zhang et al. 2022, arXiv:2110.01786): binary cross-entropy
with logits against y, an expert's sum of activations over the largest of all tokens and experts. A
negative logit has no place in scores that are compared by size, so that the score is its softplus:

    score = softplus(logit) = -log(1 - sigmoid(logit))      loss = (1 - y) score - y log(1 - exp(-score))

which is a monotone map of the logit: the order, and the loss at its best, are those of the classifier.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from .errors import CalibrationError
from .judging import judge

LEVEL = 0.25  # relative target that the median pair is moved to; .12 to .35 in MiniLM's layers
EXPONENTS = (0.5, 2.0)  # bounds of the power; MiniLM takes .65 to 1.33 with 48 experts
LEARNING_RATE = 5e-3  # Adam, warmed up, then a cosine to zero; 2e-3 was worse on MiniLM
STEPS_PER_EPOCH = 64  # batches are chosen for it, between 32 and 1024 tokens
HUBER = 0.1  # relative errors above it count linearly
HELD_OUT = 16  # every 16th block of BLOCK tokens validates: neighbours share a text
BLOCK = 128
CHECKS = 10  # validations during a fit; the best one is kept
CERTAIN = 0.999  # largest target of a classifier, whose score would be infinite at 1
CHUNK = 1 << 24  # elements of temporaries: 64 MiB


@dataclass(frozen=True, eq=False)
class Router:
    """Two bias-free linear layers: w1 [R, D] and w2 [E, R], fp32.

    `stats` are figures on held-out tokens: `exponent` (scores predict norm ** exponent), `loss`,
    `tokens`, `epoch` of the best validation (0: the start) of the `epochs` that ran, and those of
    `judging.judge`.
    """

    w1: Tensor
    w2: Tensor
    stats: dict[str, float]

    def __call__(self, x: Tensor) -> Tensor:
        """Scores [..., E] fp32 of tokens x [..., D]; never negative."""
        return _raw(x.to(self.w1.dtype), self.w1, self.w2).abs()


def gram(w_down: Tensor) -> Tensor:
    """Gram matrices [E, F, F] fp32 of each expert's rows of the down projection [E, F, D]."""
    if w_down.ndim != 3:
        raise CalibrationError(f"w_down has shape {[*w_down.shape]}; expected [E, F, D].")
    rows = w_down.detach().float()
    return rows @ rows.transpose(1, 2)


def expert_norms(hidden: Tensor, gram: Tensor) -> Tensor:
    """L2 norm [T, E] fp32 of what each expert adds to each token, output bias left out.

    hidden [T, E, F] after the activation, neurons in expert order, any float dtype; gram [E, F, F]
    from `gram`. Exact up to fp32 rounding: sums run in fp32, tiny negatives become 0. Temporaries
    are bounded by CHUNK elements. Raises CalibrationError when the shapes disagree.
    """
    if hidden.ndim != 3 or gram.shape != (*hidden.shape[1:], hidden.shape[-1]):
        raise CalibrationError(
            f"hidden has shape {[*hidden.shape]} and gram {[*gram.shape]}; "
            "expected [T, E, F] and [E, F, F]."
        )
    _, experts, size = hidden.shape
    out = torch.empty(hidden.shape[:2], dtype=torch.float32, device=hidden.device)
    rows = max(1, CHUNK // (experts * size))
    for done, part in zip(torch.split(out, rows), torch.split(hidden.detach(), rows), strict=True):
        h = part.float().transpose(0, 1)
        squares = ((h @ gram) * h).sum(-1)
        done.copy_(squares.T.clamp_min(0).sqrt())
    return out


def fit_router(
    x: Tensor,
    targets: Tensor,
    *,
    width: int = 128,
    seed: int = 0,
    epochs: int = 30,
    level: float | None = LEVEL,
    patience: int = 0,
    classify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Router:
    """Fit a router of hidden size `width` to expert norms, on the device of x.

    x [T, D] of any float dtype, what the router will see; targets [T, E], from `expert_norms`.
    `level` moves the median relative target there by one power; None predicts the norms as they
    are, as the paper does. `patience`: epochs without a better validation after which the fit ends, 0
    for never. `classify`: targets are sums of activations, and the fit is MoEfication's (see the module);
    `level` has no part in it. `progress(done, epochs)` is called after each epoch. The same seed gives
    the same router on one machine and number of threads; the global random state is not touched.
    Memory beyond the arguments: one fp32 copy of the targets. Raises CalibrationError for data that
    is empty, not finite or does not match.
    """
    _check(x, targets, width, epochs, level)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(x.device.type, enabled=False),
    ):
        exponent = 1.0 if level is None or classify else _exponent(targets, level)
        goal = targets.detach().float().pow(exponent)
        if classify:
            goal = -torch.log1p(-CERTAIN * goal / goal.max().clamp_min(1e-30))
        fitted, held = _split(len(x), x.device)
        scale_in, scale_out = _scales(x, goal)
        goal /= scale_out
        loss = partial(_cross_entropy, scale_out) if classify else _loss
        data = _Data(x.detach(), goal, scale_in, fitted, held, loss)
        w1, w2, stats = _train(data, width, seed, epochs, patience, progress)
        router = Router((w1 / scale_in).contiguous(), w2 * scale_out, {})
        stats |= {"exponent": exponent, "tokens": float(len(x))}
        stats |= validated(router, x, goal.mul_(scale_out))
    return Router(router.w1, router.w2, stats)


def validated(router: Router, x: Tensor, goal: Tensor) -> dict[str, float]:
    """What a router gets right on the held-out tokens among x [T, D] with wanted scores [T, E]."""
    _, held = _split(len(x), x.device)
    held = held[: max(1, CHUNK // (x.shape[1] + 4 * goal.shape[1]))]
    return judge(router(x[held]), goal[held].float())


@dataclass(frozen=True)
class _Data:
    """Tokens, scaled targets, the scale of each input feature, which rows fit or validate, and the loss."""

    x: Tensor
    goal: Tensor
    scale: Tensor
    fitted: Tensor
    held: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[index].float() / self.scale, self.goal[index]


def _train(
    data: _Data,
    width: int,
    seed: int,
    epochs: int,
    patience: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Adam on minibatches; the weights of the best validation, its loss and epoch, and epochs run."""
    generator = torch.Generator().manual_seed(seed)
    w1, w2 = _start(data, width, generator)
    optimizer = torch.optim.Adam([w1, w2], lr=LEARNING_RATE, betas=(0.9, 0.98))
    batch = min(1024, max(32, len(data.fitted) // STEPS_PER_EPOCH))
    steps = epochs * math.ceil(len(data.fitted) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    best = (w1.detach().clone(), w2.detach().clone(), _validate(data, w1, w2), 0)
    done = 0
    for epoch in range(epochs):
        order = torch.randperm(len(data.fitted), generator=generator)
        for index in torch.split(order.to(data.x.device), batch):
            x, goal = data.rows(data.fitted[index])
            optimizer.zero_grad()
            torch.autograd.backward(data.loss(_raw(x, w1, w2), goal))
            optimizer.step()
            schedule.step()
        if epoch % math.ceil(epochs / CHECKS) == 0 or epoch == epochs - 1:
            loss = _validate(data, w1, w2)
            if loss < best[2]:
                best = (w1.detach().clone(), w2.detach().clone(), loss, epoch + 1)
        done = epoch + 1
        if progress is not None:
            progress(done, epochs)
        if patience and done - best[3] >= patience:
            break
    figures = {"loss": best[2], "epoch": float(best[3]), "epochs": float(done)}
    return best[0], best[1], figures


def _start(data: _Data, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random first layer; second layer by ridge regression on its features."""
    features = data.x.shape[1]
    w1 = torch.randn(width, features, generator=generator).to(data.x.device) / math.sqrt(features)
    x, goal = data.rows(data.fitted[:: max(1, len(data.fitted) // 16384)])
    hidden = (x @ w1.T).relu()
    normal = hidden.T @ hidden
    ridge = 1e-2 * normal.diagonal().mean() + 1e-6
    normal += ridge * torch.eye(width, device=normal.device)
    w2 = torch.linalg.solve(normal, hidden.T @ goal).T.contiguous()
    return w1.requires_grad_(), w2.requires_grad_()


def _raw(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return (x @ w1.T).relu() @ w2.T


def _loss(raw: Tensor, goal: Tensor) -> Tensor:
    """Huber loss of the error relative to the largest target of each row."""
    error = (raw - goal) / goal.amax(1, keepdim=True).clamp_min(1e-3)
    return functional.smooth_l1_loss(error, torch.zeros_like(error), beta=HUBER)


def _cross_entropy(scale: Tensor, raw: Tensor, goal: Tensor) -> Tensor:
    """Binary cross-entropy of the logits whose softplus the scores are, both in units of `scale`."""
    score, y = raw.abs() * scale + 1e-6, -torch.expm1(-goal * scale)
    return ((1 - y) * score - y * torch.log(-torch.expm1(-score))).mean()


@torch.no_grad()
def _validate(data: _Data, w1: Tensor, w2: Tensor) -> float:
    x, goal = data.rows(data.held[:: max(1, len(data.held) // 8192)])
    return data.loss(_raw(x, w1, w2), goal).item()


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a linear warm-up over a thirtieth, then half a cosine."""
    return min(1.0, 30 * (step + 1) / steps) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _exponent(targets: Tensor, level: float) -> float:
    """The power that moves the median of the relative targets to `level`, within EXPONENTS."""
    rows = targets.detach()[:: max(1, len(targets) * targets.shape[1] // CHUNK)].float()
    most = rows.amax(1, keepdim=True)
    median = (rows / most)[most.squeeze(1) > 0].flatten()
    middle = median.median().item() if len(median) else 1.0
    if middle >= 1.0:  # one expert, equal experts or silence: nothing to spread
        return 1.0
    wanted = math.log(level) / math.log(middle) if middle > 0 else 0.0
    return min(max(wanted, EXPONENTS[0]), EXPONENTS[1])


def _split(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices to fit on and to validate on; the same ones where there is too little to hold out."""
    index = torch.arange(tokens, device=device)
    held = (index // min(BLOCK, max(1, tokens // (2 * HELD_OUT)))) % HELD_OUT == HELD_OUT - 1
    return (index[~held], index[held]) if tokens >= 2 * HELD_OUT else (index, index)


def _scales(x: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square of each input feature [D], mean of the targets []; never zero."""
    sample = x.detach()[:: max(1, len(x) // 16384)].float()
    squares = sample.square().mean(0)
    floor = 1e-6 * squares.mean() + 1e-30  # a feature that is always zero stays small
    return (squares + floor).sqrt(), goal.mean().clamp_min(1e-30)


def _check(x: Tensor, targets: Tensor, width: int, epochs: int, level: float | None) -> None:
    """Raise CalibrationError unless x [T, D] and targets [T, E] can be fitted."""
    if x.ndim != 2 or targets.ndim != 2 or len(x) != len(targets):
        raise CalibrationError(
            f"x has shape {[*x.shape]} and targets {[*targets.shape]}; expected [T, D] and [T, E]."
        )
    if x.numel() == 0 or targets.numel() == 0:
        raise CalibrationError("No token to fit a router on; pass batches that reach this block.")
    if not (x.is_floating_point() and targets.is_floating_point()):
        raise CalibrationError(f"x is {x.dtype} and targets {targets.dtype}; expected floats.")
    for name, value in (("x", x), ("targets", targets)):
        if not value.isfinite().all():
            raise CalibrationError(
                f"{name} holds NaN or infinity; check the calibration batches and the dtype."
            )
    if (targets < 0).any():
        raise CalibrationError("targets holds negative numbers; expected norms.")
    if width < 1 or epochs < 1 or not (level is None or 0 < level < 1):
        raise CalibrationError(
            f"width {width}, epochs {epochs}, level {level}; "
            "expected at least 1, at least 1, and a number in (0, 1) or None."
        )
