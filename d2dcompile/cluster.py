"""Split hidden neurons into experts of exactly equal size by balanced k-means, seeded.

    minimise   sum over e, over i in e, of |x_i - mean_e|^2       each expert owns F = N / E rows
    which is   sum |x_i|^2 - sum over e of |S_e|^2 / F            S_e = sum of the rows of expert e

Rows are the up-projection (or gate) weights of the neurons, L2-normalised: the parameter clustering
of MoEfication (Zhang et al. 2022, arXiv:2110.01786) that D2DMoE uses. Three stages, all vectorised:

1. Seeds by k-means++ (Arthur and Vassilvitskii 2007), a sixteenth of the experts per draw.
2. Reassign all rows at prices that fill every expert evenly (Sinkhorn; Cuturi 2013,
   arXiv:1306.0895). A row sits in the mean of its own expert and so favours it; most of that pull
   is taken out, without which the means of small experts hardly move.
3. Swap rows between pairs of experts, with exact gains. The objective is a sum over experts, so
   swaps that share no expert add up and are applied together.

Memory is a few N x E and two N x d fp32 arrays. The same seed gives the same labels on the same
machine and torch version; on large inputs also with the same number of threads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .errors import PlanError

# Chosen on the inputs of benchmarks/cluster.py, whose objectives are flat around these values.
DRAWS = 16  # rounds of drawing seeds; with 8, two seeds share a planted cluster more often
PASSES = 20  # reassignments at most; 5 to 9 are usual
PASS_COST = 5  # swap rounds in the time of a pass, which must gain as many times more to go on
SELF_SHARE = 0.6  # share of a row's pull on its own mean taken out; 1 is exact for one move alone
SOFTNESS = 0.25  # Sinkhorn temperature, in standard deviations of the scores
SWEEPS = 10  # Sinkhorn sweeps per pass; prices start from those of the pass before
SWAP_GAIN = 1e-4  # a swap must lower the objective (at most N) by this much: above fp32 noise
CANDIDATES = 2  # pairs of experts looked at per expert and swap round
SMALL = 10**9  # multiply-adds per pass below which one thread is used: on two shared cores the
# thread barriers of many short ops made N = 3072, E = 128 five times slower than one thread


@dataclass(frozen=True)
class Clusters:
    """A balanced split: `labels` [N] int64, each expert exactly N / E times.

    `objective` is the sum of squared distances of the normalised rows to their expert's mean;
    `iterations` counts the reassignments and swap rounds that were run.
    """

    labels: Tensor
    objective: float
    iterations: int


def balanced_kmeans(
    features: Tensor,
    experts: int,
    *,
    seed: int = 0,
    iterations: int = 200,
    tolerance: float = 1e-3,
    progress: Callable[[int, int], None] | None = None,
) -> Clusters:
    """Balanced k-means of the L2-normalised rows of `features` into `experts` equal clusters.

    features [N, d] of any float dtype, cast to fp32; zero rows stay zero. Ends when a swap round
    lowers the objective by less than the share `tolerance`: 1e-4 gains 0.2 to 1.9 % over 1e-3, for
    1.3 to 4 times the time. `iterations` caps the reassignments and swap rounds together (4 to 30
    are usual); `progress(done, iterations)` is called after each.
    Raises PlanError if `features` is not a finite [N, d] or `experts` does not divide N.
    """
    _check_features(features)
    _check_split(len(features), experts)
    if iterations < 1:
        raise PlanError(
            f"iterations is {iterations}; expected at least 1. Leave it at its default."
        )
    done = 0

    def tick() -> bool:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, iterations)
        return done < iterations

    threads = torch.get_num_threads()
    try:
        if features.numel() * experts < SMALL:
            torch.set_num_threads(1)
        rows = _normalised(features.detach())
        labels = _cluster(rows, experts, seed, tolerance, tick)
        return Clusters(labels, _objective(rows, labels, experts), done)
    finally:
        torch.set_num_threads(threads)


def random_split(neurons: int, experts: int, *, seed: int = 0) -> Tensor:
    """Labels [neurons] int64 of a uniformly random balanced split: the baseline of clustering.

    Raises PlanError if `experts` does not divide `neurons`.
    """
    _check_split(neurons, experts)
    labels = torch.empty(neurons, dtype=torch.int64)
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))
    labels[order] = torch.arange(neurons) % experts
    return labels


def permutation(labels: Tensor) -> Tensor:
    """Neurons [N] int64 sorted by expert, then by index: new slot -> old neuron."""
    return labels.argsort(stable=True)


def _check_features(features: Tensor) -> None:
    if features.dim() != 2 or not features.is_floating_point():
        raise PlanError(
            f"features is {features.dtype} of shape {tuple(features.shape)}; expected a float "
            "matrix [neurons, width]. Pass the weight of the up (or gate) projection."
        )
    if features.numel() and not torch.stack(features.aminmax()).isfinite().all():
        bad = (~features.isfinite().all(1)).nonzero()[:, 0]
        raise PlanError(
            f"features has NaN or infinity in {len(bad)} of {len(features)} rows, first in row "
            f"{int(bad[0])}; expected finite weights. Check the checkpoint."
        )


def _check_split(neurons: int, experts: int) -> None:
    if experts < 1 or neurons < 1 or neurons % experts:
        near = [e for e in range(1, neurons + 1) if neurons % e == 0]
        near = sorted(sorted(near, key=lambda e: abs(e - experts))[:4])
        raise PlanError(
            f"{experts} experts cannot share {neurons} neurons equally; expected a divisor of "
            f"{neurons}. Choose for example one of {near}."
        )


def _normalised(features: Tensor) -> Tensor:
    """Rows [N, d] fp32 of length 1, or 0; divided by the largest entry first, against underflow."""
    wide = features if features.dtype == torch.float64 else features.float()
    peak = wide.abs().amax(1, keepdim=True)
    rows = (wide / peak.where(peak > 0, 1)).float()
    rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1)
    return rows


def _cluster(
    rows: Tensor, experts: int, seed: int, tolerance: float, tick: Callable[[], bool]
) -> Tensor:
    """Labels [N] of normalised rows: seeds, reassignments, swaps."""
    if experts in (1, len(rows)):
        return torch.arange(len(rows), device=rows.device) % experts
    score = _seeds(rows, experts, torch.Generator().manual_seed(seed))
    labels, going = _reassign(rows, score, tolerance * PASS_COST, tick)
    return _swap(rows, labels, experts, tolerance, tick) if going else labels


def _norms(rows: Tensor) -> Tensor:
    """|x_i|^2 [N]; faster than rows.square().sum(1), which writes a second [N, d]."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1).square()
    return norms


def _objective(rows: Tensor, labels: Tensor, experts: int) -> float:
    grouped = rows[permutation(labels)].view(experts, -1, rows.shape[1])
    grouped -= grouped.mean(1, keepdim=True)
    return float(torch.linalg.vector_norm(grouped, dim=(1, 2)).double().square().sum())


def _seeds(rows: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """Scores [N, E] x_i.s_e of rows s_e, drawn with chance ~ squared distance to those before."""
    norm = _norms(rows)
    score = rows.new_empty(experts, len(rows))
    nearest = torch.full_like(norm, torch.inf)
    new = torch.randint(len(rows), (1,), generator=generator).to(rows.device)
    start = 0
    while True:
        drawn = score[start : start + len(new)]
        torch.mm(rows[new], rows.T, out=drawn)
        start += len(new)
        if start == experts:
            return score.T.contiguous()
        nearest = torch.minimum(nearest, norm + (norm[new, None] - 2 * drawn).amin(0))
        nearest.clamp_min_(1e-9)  # so that a copy of a seed can still be drawn
        count = min(max(1, experts // DRAWS), experts - start)
        new = torch.multinomial(nearest.cpu(), count, generator=generator).to(rows.device)


def _reassign(
    rows: Tensor, score: Tensor, tolerance: float, tick: Callable[[], bool]
) -> tuple[Tensor, bool]:
    """Best labels [N] met while all rows are reassigned to priced means, from score [N, E].

    Ends when a pass gains less than `tolerance`. False beside the labels if `tick` said stop.
    """
    experts, seats = score.shape[1], len(rows) // score.shape[1]
    norm = _norms(rows)
    total, spread, best = float(norm.sum()), 0.0, -1.0
    prices = rows.new_zeros(experts)
    kept, going = torch.empty(0, dtype=torch.int64), True
    for turn in range(PASSES):
        prices = _prices(score, prices, seats)
        labels = _seat(score.sub_(prices), seats)
        members = permutation(labels).view(experts, seats)
        sums = functional.embedding_bag(members, rows, mode="sum")
        before, spread = spread, float(sums.square().sum()) / seats
        if spread > best:
            best, kept = spread, labels
        going = tick()
        if not going or (turn and spread - before < tolerance * (total - spread)):
            break
        torch.mm(rows, sums.div_(seats).T, out=score)
        score.scatter_add_(1, labels[:, None], (norm * (-SELF_SHARE / seats))[:, None])
    return kept, going


def _prices(score: Tensor, prices: Tensor, seats: int) -> Tensor:
    """Price per expert [E] at which soft choices among score [N, E] fill all experts evenly."""
    some = score[:: max(1, len(score) // 1024)]  # enough rows for a standard deviation
    width = some.std().clamp_min(1e-12) * SOFTNESS
    kernel = (score - prices).div_(width).softmax(1)
    weight = torch.ones_like(prices)
    for _ in range(SWEEPS):
        share = 1 / (kernel @ weight)
        weight = seats / (share @ kernel).clamp_min(1e-20)
    return prices - width * weight.log()


def _seat(score: Tensor, seats: int) -> Tensor:
    """Labels [N] by best score [N, E]: each expert seats exactly `seats` rows, firmest first.

    A row turned away chooses again among experts with free seats, so every turn seats some row.
    """
    rows, experts = score.shape
    labels = torch.empty(rows, dtype=torch.int64, device=score.device)
    free = torch.full((experts,), seats, device=score.device)
    waiting = torch.arange(rows, device=score.device)
    while len(waiting):
        first, expert = score.max(1)
        second = score.scatter_(1, expert[:, None], -torch.inf).amax(1)  # faster than topk(2)
        score.scatter_(1, expert[:, None], first[:, None])
        order = (first - second).argsort(descending=True, stable=True)
        order = order[expert[order].argsort(stable=True)]
        choice = expert[order]
        count = choice.bincount(minlength=experts)
        rank = torch.arange(len(order), device=score.device) - (count.cumsum(0) - count)[choice]
        seated = rank < free[choice]
        labels[waiting[order[seated]]] = choice[seated]
        free = (free - count).clamp_min(0)
        score, waiting = score[order[~seated]], waiting[order[~seated]]
        score[:, free == 0] = -torch.inf
    return labels


def _swap(
    rows: Tensor, labels: Tensor, experts: int, tolerance: float, tick: Callable[[], bool]
) -> Tensor:
    """Labels [N] after rounds of swaps, until a round gains less than the share `tolerance`.

    Swapping i of a with j of b raises sum |S_e|^2 by 2 (move[b, i] + move[a, j] - 2 x_i.x_j) where
    move[e, i] = x_i.S_e - x_i.S_own + |x_i|^2. Only the best i and j of each (a, b) are looked at.
    """
    order = permutation(labels)  # slot -> row; expert e owns slots e F .. e F + F - 1
    slots, seats = rows[order], len(rows) // experts
    norm = _norms(slots)
    sums = slots.view(experts, seats, -1).sum(1)
    objective = float(norm.double().sum() - sums.double().square().sum() / seats)
    pull = sums @ slots.T  # [E, N] x_i . S_e
    grid = pull.view(experts, experts, seats)  # [target, owner, seat]
    move = pull.new_empty(experts, experts)
    seat = torch.empty_like(move, dtype=torch.int64)
    stale = torch.arange(experts, device=rows.device)
    going = True
    while going:
        own = grid.diagonal().T - norm.view(experts, seats)
        move[stale], seat[stale] = (grid[stale] - own).max(2)
        move[:, stale], seat[:, stale] = (grid[:, stale] - own[stale]).max(2)
        a, b, i, j, gain = _candidates(move, seat, slots)
        change = (slots[j] - slots[i]) @ slots.T
        pull[a] += change
        pull[b] -= change
        here, there = torch.cat([i, j]), torch.cat([j, i])
        for tensor in (slots, norm, order):
            tensor[here] = tensor[there]
        pull[:, here] = pull[:, there]
        stale = torch.cat([a, b])
        objective -= gain
        going = tick() and gain > tolerance * max(objective, 0.0)
    result = torch.empty_like(order)
    result[order] = torch.arange(len(rows), device=rows.device) // seats
    return result


def _candidates(
    move: Tensor, seat: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Improving swaps (a, b, i, j) of slot i of expert a with slot j of b, and their total gain.

    No expert is named twice. Greedy by gain: every swap that is the best of both its experts.
    """
    experts, seats = len(move), len(slots) // len(move)
    lower, upper = torch.triu_indices(experts, experts, 1, device=move.device)
    bound = (move + move.T)[lower, upper]
    top = bound.topk(min(CANDIDATES * experts, len(bound)))
    a, b = lower[top.indices], upper[top.indices]
    i, j = a * seats + seat[b, a], b * seats + seat[a, b]
    gain = (top.values - 2 * (slots[i] * slots[j]).sum(1)) * (2 / seats)
    order = gain.argsort(descending=True, stable=True)
    order = order[gain[order] > SWAP_GAIN]
    chosen = order[:0]
    while len(order):
        ends = torch.stack([a[order], b[order]])
        place = torch.arange(len(order), device=move.device)
        first = torch.full((experts,), len(order), device=move.device)
        first = first.scatter_reduce(0, ends.flatten(), place.repeat(2), "amin")
        best = (first[ends] == place).all(0)
        chosen = torch.cat([chosen, order[best]])
        busy = torch.zeros(experts, dtype=torch.bool, device=move.device)
        busy[ends[:, best]] = True
        order = order[~busy[ends].any(0)]
    return a[chosen], b[chosen], i[chosen], j[chosen], float(gain[chosen].sum())
