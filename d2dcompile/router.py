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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import CalibrationError
from .fitting import CrossEntropy, Data, Loss, RelativeLoss, raw, train, unit_of
from .judging import judge

LEVEL = 0.25  # relative target that the median pair is moved to; .12 to .35 in MiniLM's layers
EXPONENTS = (0.5, 2.0)  # bounds of the power; MiniLM takes .65 to 1.33 with 48 experts
HELD_OUT = 16  # every 16th block of BLOCK tokens validates: neighbours share a text
BLOCK = 128
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
        return raw(x.to(self.w1.dtype), self.w1, self.w2).abs()


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
    (found,) = fit_routers(
        [(x, targets)],
        width=width, seed=seed, epochs=epochs, level=level, patience=patience, classify=classify,
        progress=progress,
    )  # fmt: skip
    return found


def fit_routers(
    sites: Sequence[tuple[Tensor, Tensor]],
    *,
    width: int = 128,
    seed: int = 0,
    epochs: int = 30,
    level: float | None = LEVEL,
    patience: int = 0,
    classify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Router]:
    """Routers of several sites with one first layer, the very same tensor w1, fitted to all together.

    sites: x [T, D] and targets [T, E] of each, as for `fit_router`; D has to be the same, T and E may
    differ. Every site's loss has the same weight. Of one site it is `fit_router`. The best validation is
    that of the mean loss. Raises CalibrationError as `fit_router`, and for another D.
    """
    for x, targets in sites:
        _check(x, targets, width, epochs, level)
    if len({x.shape[1] for x, _ in sites}) != 1:
        raise CalibrationError(
            f"The sites' tokens have {[x.shape[1] for x, _ in sites]} features; expected one number for "
            "sites that share a router's first layer."
        )
    first = sites[0][0]
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(first.device.type, enabled=False),
    ):
        data, scales, exponents = [], [], []
        scale_in = _scale_in([x for x, _ in sites])
        for x, targets in sites:
            exponent = 1.0 if level is None or classify else _exponent(targets, level)
            goal = goal_of(targets, exponent, classify)
            fitted, held = _split(len(x), x.device)
            scale = goal.mean().clamp_min(1e-30) if classify else unit_of(goal)
            goal /= scale
            loss: Loss = CrossEntropy(scale) if classify else RelativeLoss.of(goal)
            data.append(Data(x.detach(), goal, scale_in, fitted, held, loss))
            scales.append(scale)
            exponents.append(exponent)
        found = train(data, width, seed, epochs, patience, progress)
        w1, routers = (found.w1 / scale_in).contiguous(), []
        for i, one in enumerate(data):
            stats = {"loss": found.losses[i], "epoch": float(found.epoch)}
            stats |= {"epochs": float(found.epochs), "exponent": exponents[i]}
            stats["tokens"] = float(len(one.x))
            router = Router(w1, found.w2[i] * scales[i], stats)
            stats |= validated(router, one.x, one.goal.mul_(scales[i]))
            routers.append(router)
    return routers


def goal_of(targets: Tensor, exponent: float, classify: bool) -> Tensor:
    """The scores [T, E] fp32 that a router is to give, of norms or, for a classifier, activation sums."""
    goal = targets.detach().float().pow(exponent)
    if classify:
        goal = -torch.log1p(-CERTAIN * goal / goal.max().clamp_min(1e-30))
    return goal


def validated(router: Router, x: Tensor, goal: Tensor) -> dict[str, float]:
    """What a router gets right on the held-out tokens among x [T, D] with wanted scores [T, E]."""
    _, held = _split(len(x), x.device)
    held = held[: max(1, CHUNK // (x.shape[1] + 4 * goal.shape[1]))]
    return judge(router(x[held]), goal[held].float())


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


def _scale_in(sites: Sequence[Tensor]) -> Tensor:
    """Root mean square of each input feature [D], the mean over the sites; never zero."""
    squares = []
    for x in sites:
        sample = x.detach()[:: max(1, len(x) // 16384)].float()
        squares.append(sample.square().mean(0))
    mean = torch.stack(squares).mean(0)
    floor = 1e-6 * mean.mean() + 1e-30  # a feature that is always zero stays small
    return (mean + floor).sqrt()


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
