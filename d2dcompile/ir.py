"""The nouns that cross a stage: Site and Miss (match), Plan (plan), Experts and Conversion (convert),
Schedule (tune).

Sizes: D d_model, H d_hidden, E experts, F = H/E neurons per expert, R router width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .config import Config

if TYPE_CHECKING:
    from torch.fx import Node


@dataclass(frozen=True)
class Site:
    """A subgraph that is a dense feed-forward block or projection, with the parameters it uses.

    Attributes:
        name: module path that its parameters share, unique within the model.
        kind: "ffn" down(act(up(x))), "glu" down(f(gate(x), up(x))), or "projection".
        params: weight names by role: up, gate, gate_up, down; "weight" for a projection.
        biases: bias names by the same roles, and learnable activation scalars as p0, p1, ...
        activation: the elementwise expression between the matrices, e.g. "silu(gate) * up"; "" for a
            projection.
        d_model: D, features of the input.
        d_hidden: H, hidden neurons; of a projection the features of its output.
        transposed: roles whose weight is stored [in, out] (GPT-2's Conv1D) instead of [out, in].
        halves: which of the two halves of gate_up comes first, e.g. ("gate", "up"); else empty.
        interleaved: whether the halves alternate row by row instead of following one another.
        share: fraction of the model's multiply-adds spent in this site, 0..1 (0 if unmeasured).
        role: what it makes for attention, "q", "k", "v", "o", "qk", "kv" or "qkv": of projections, and of
            blocks that stand for one; None otherwise.
        calls: how often one forward pass runs these weights.
        d_out: features of the output; 0 stands for D, of a projection for d_hidden.
    """

    name: str
    kind: str
    params: Mapping[str, str]
    biases: Mapping[str, str]
    activation: str
    d_model: int
    d_hidden: int
    transposed: tuple[str, ...] = ()
    halves: tuple[str, ...] = ()
    share: float = 0.0
    role: str | None = None
    calls: int = 1
    interleaved: bool = False
    d_out: int = 0

    def __post_init__(self) -> None:
        width = self.d_hidden if self.kind == "projection" else self.d_model
        object.__setattr__(self, "d_out", self.d_out or width)

    @property
    def convertible(self) -> bool:
        """Whether `convert` makes experts of it; projections are only reported so far."""
        return self.kind != "projection"

    @property
    def tensors(self) -> dict[str, str]:
        """Names of all parameters, weights as `role` and biases as `role.bias`."""
        return {**self.params, **{f"{role}.bias": name for role, name in self.biases.items()}}


@dataclass(frozen=True)
class Miss:
    """A linear layer that is not part of a site, and why; falsy, so `match(...) or ...` reads well.

    Attributes:
        node: the graph node to blame; None for a linear that is in no captured graph.
        reason: what was seen there and what a site would need.
        where: module path and source line of that node, as far as the graph knows them.
        weight: name of the linear's weight, "" where it has none.
        share: fraction of the model's multiply-adds that the linear costs, 0..1 (0 if unmeasured).
    """

    node: Node | None
    reason: str
    where: str = ""
    weight: str = ""
    share: float = 0.0

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Plan:
    """How a site is split: E experts of F neurons, routed by a two-layer router of width R."""

    experts: int
    expert_size: int
    router_width: int


@dataclass(frozen=True)
class Schedule:
    """How a block's kernel runs on one processor: closed-form defaults, or what a tuning run measured.

    Attributes:
        decode: whether one token is computed from the model's own weights, not from a packed copy.
        fused_rows: tokens of a call up to which weights are streamed once per thread, up and down
            together; above, all hidden values are computed first.
        near, far: bytes of weights to fetch ahead while one tile of rows, or several, use each.
        break_even: pairs (tokens, share) in rising order: from so many tokens a call on, an executed
            share above this one costs more than to skip the router and run every expert; a share of 1
            means that it never does.
    """

    decode: bool = True
    fused_rows: int = 128  # equal at 64 to 197 tokens on two cores of a Zen 4
    near: int = 8192
    far: int = 65536
    # Router and gathering cost about 5 % of a block's arithmetic there.
    break_even: tuple[tuple[int, float], ...] = ((129, 0.93),)

    def dense_rows(self, share: float) -> int:
        """From how many tokens a call on every expert runs if `share` would be executed; 0: never."""
        found = 0
        for rows, limit in reversed(self.break_even):
            if share <= limit:
                break
            found = rows
        return found


@dataclass(frozen=True, eq=False)
class Experts:
    """The conversion of one site.

    Attributes:
        site, plan: what is converted, into how many experts.
        permutation: [H] int64; slot i of the expert order holds neuron permutation[i].
        router1, router2: [R, D] and [E, R] fp32; scores = |relu(x router1^T) router2^T|. Sites that
            share their first layer hold the very same tensor router1.
        tau: default number of this site's rule: its threshold, 0..1, or k or p (see `kernels.gate`).
        hashes: per tensor of the site {"shape": [...], "dense": {dtype: sha256}, "permuted": ...},
            of the values before and after the permutation, as stored and as cast to other dtypes.
        stats: validation figures of the router fit.
        rule: default rule of this site, "max", "top_k" or "top_p".

    A row of NaN in router2 is a shared expert: the gate never compares and never drops it.
    """

    site: Site
    plan: Plan
    permutation: Tensor
    router1: Tensor
    router2: Tensor
    tau: float
    hashes: Mapping[str, Any]
    stats: Mapping[str, float] = field(default_factory=dict)
    rule: str = "max"

    @property
    def shared(self) -> Tensor:
        """[E] bool, which experts are always on."""
        return self.router2[:, 0].isnan()


@dataclass(frozen=True)
class Conversion:
    """A converted model's experts by site name, apart from the model's own weights.

    Attributes:
        experts: {site name: Experts}.
        dense: {site name: reason} of sites that were found but stay dense.
        config: the configuration that made it.
    """

    experts: Mapping[str, Experts]
    dense: Mapping[str, str] = field(default_factory=dict)
    config: Config = field(default_factory=Config)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the sidecar `d2dmoe.json` + `d2dmoe.safetensors` (see `d2dcompile.artifact`)."""
        from .artifact import save

        save(self, folder)

    def attach(self, model: nn.Module) -> nn.Module:
        """Permute the model's neurons in place and register routers (see `d2dcompile.attachment`)."""
        from .attachment import attach

        return attach(model, self)
