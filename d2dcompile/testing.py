"""For tests of passes, kernels and conversions: tiny models, capture, and a reference compare.

Public, because users write passes and kernels too.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from .attachment import attached, states
from .capture import Captured, from_dynamo, parameter_names
from .trial import routing_masks as routing_masks

VOCABULARY = 99
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


@dataclass(frozen=True)
class Tiny:
    """A tiny random-weight transformer: model in eval mode, inputs, number of FFN blocks."""

    model: nn.Module
    inputs: dict[str, Tensor]
    blocks: int


def _ids(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, VOCABULARY, shape, generator=generator)


def _bert(t: Any) -> Tiny:
    return Tiny(t.BertModel(t.BertConfig(**_SIZES)), {"input_ids": _ids(2, 17)}, 2)


def _gpt2(t: Any) -> Tiny:
    config = t.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)
    return Tiny(t.GPT2LMHeadModel(config), {"input_ids": _ids(2, 17)}, 2)


def _vit(t: Any) -> Tiny:
    sizes = {k: v for k, v in _SIZES.items() if k != "vocab_size"}
    config = t.ViTConfig(**sizes, image_size=32, patch_size=8)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Tiny(t.ViTModel(config), {"pixel_values": pixels}, 2)


def _opt(t: Any) -> Tiny:
    sizes = {k: v for k, v in _SIZES.items() if k != "intermediate_size"}
    config = t.OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)
    return Tiny(t.OPTForCausalLM(config), {"input_ids": _ids(2, 17)}, 2)


def _t5(t: Any) -> Tiny:
    config = t.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    inputs = {"input_ids": _ids(2, 17), "decoder_input_ids": _ids(2, 7)}
    return Tiny(t.T5ForConditionalGeneration(config), inputs, 4)


def _llama(t: Any) -> Tiny:
    return Tiny(t.LlamaForCausalLM(t.LlamaConfig(**_SIZES)), {"input_ids": _ids(2, 17)}, 2)


def _gemma(t: Any) -> Tiny:
    config = t.GemmaConfig(**_SIZES, head_dim=8, num_key_value_heads=4)
    return Tiny(t.GemmaForCausalLM(config), {"input_ids": _ids(2, 17)}, 2)


def _phi3(t: Any) -> Tiny:
    config = t.Phi3Config(**_SIZES, pad_token_id=0)
    return Tiny(t.Phi3ForCausalLM(config), {"input_ids": _ids(2, 17)}, 2)


FAMILIES: Mapping[str, Callable[[Any], Tiny]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "vit": _vit,
    "opt": _opt,
    "t5": _t5,
    "llama": _llama,
    "gemma": _gemma,
    "phi3": _phi3,
}


def tiny(family: str, seed: int = 0) -> Tiny:
    """A seeded tiny model of one of FAMILIES, with inputs for one call; needs transformers."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = FAMILIES[family](transformers)
    made.model.eval()
    return made


class FFN(nn.Module):
    """down(act(up(x))) with a residual, the plain block: D features, H hidden neurons."""

    def __init__(
        self, d: int = 16, h: int = 64, act: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, h), nn.Linear(h, d)
        self.act = act or torch.nn.functional.gelu

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.act(self.up(x)))
        return y


class Stack(nn.Module):
    """A stack of blocks, as small a transformer-like model as there is; `seed` makes it repeatable."""

    def __init__(self, depth: int = 2, d: int = 16, h: int = 64, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(FFN(d, h) for _ in range(depth))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def capture(model: nn.Module, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Captured:
    """The one Dynamo graph of `model(*args, **kwargs)`, as the backend sees it.

    Raises AssertionError if Dynamo makes more than one graph of it.
    """
    found: list[Captured] = []

    def recorder(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(from_dynamo(gm, inputs, parameter_names(model)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=recorder, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    assert len(found) == 1, f"{len(found)} graphs; expected one"
    return found[0]


def output(result: Any) -> Tensor:
    """The main tensor of a model's result: itself, its logits, or its first tensor."""
    if isinstance(result, Tensor):
        return result
    found = getattr(result, "logits", None)
    first = found if found is not None else next(iter(result.values()))
    assert isinstance(first, Tensor)
    return first


def in_dtype(tiny: Tiny, dtype: torch.dtype) -> Tiny:
    """A deep copy of a tiny model and its inputs in another float dtype."""
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.inputs.items()}
    return Tiny(copy.deepcopy(tiny.model).to(dtype), inputs, tiny.blocks)


def rms(difference: Tensor) -> float:
    """Root mean square of a tensor, in fp64."""
    return float(difference.double().square().mean().sqrt())


def error_ratio(result: Tensor, dense: Tensor, exact: Tensor) -> float:
    """RMS error of `result` against fp64 `exact`, in units of the error that `dense` makes.

    An error of a tenth of a unit in the last place of the largest value counts as none: dense may be
    right by luck there.
    """
    last_place = torch.finfo(result.dtype).eps * float(exact.abs().max()) / 10
    return rms(result.double() - exact) / max(rms(dense.double() - exact), last_place)


def batches_of(inputs: Any, count: int) -> list[Any]:
    """The same batch several times, for calibration in tests."""
    return list(itertools.repeat(inputs, count))


@contextmanager
def forced_share(model: nn.Module, share: float, rows: int = 4096, seed: int = 0) -> Iterator[None]:
    """Run a converted model's blocks at an executed share, whatever their routers say, for measuring time.

    Routers and gates are still computed; then row i of a block's input takes mask i modulo `rows`
    (`routing_masks`, another for each block). Affects kernels that run a block at once only.
    """
    held = states(model)
    for index, state in enumerate(held):
        masks = routing_masks(rows, state.experts.plan.experts, share, seed + index)
        state.force_masks(masks)
    try:
        yield
    finally:
        for state in held:
            state.force_masks(None)


@contextmanager
def oracle(model: nn.Module) -> Iterator[None]:
    """Let a converted model compare its experts' exact output norms instead of its routers' scores.

    Norms are raised to the power that each site's router was fitted to, so that a tau means the same; shared
    experts stay on. Every expert is computed, for evaluation: `measure`, `fit_tau` and models compiled with
    options={"inner": "eager"} (any inner backend runs) follow it; costs count the router's multiply-adds
    as usual. Graphs compiled before are compiled anew, at the start and at the end.

    Raises NoConversionError for a model without a conversion.
    """
    held = attached(model)
    for state in held:
        state.exact = float(state.experts.stats.get("exponent", 1.0))
    torch.compiler.reset()
    try:
        yield
    finally:
        for state in held:
            state.exact = None
        torch.compiler.reset()
