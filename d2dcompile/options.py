"""Options: what `options=` of torch.compile may hold, each checked before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from .config import check_tau
from .errors import OptionError
from .ir import Conversion

INNER = ("inductor", "aot_eager", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Options:
    """What `options=` of torch.compile may hold.

    Attributes:
        conversion: a Conversion or the folder of a saved one, attached to the weights that carry its
            hashes; without it the conversion already attached to the model is used.
        tau: threshold to set on every site when a graph is compiled; None keeps the sites' own.
        strict: whether convertible sites without a conversion are an error (True) or run dense with
            one warning (False).
        inner: who compiles the rewritten graph: "inductor", "aot_eager" or "eager".
        pack: whether CPU kernels may keep a copy of each converted block's weights in an order of their
            own, made when a block first gets more than one token (as Inductor's freezing does);
            without, they reorder what they read at every call. One token never needs the copy.
        int8: whether calls of one token run on int8 copies of the converted blocks' weights, made at the
            first such call, with the token and the hidden values rounded to int8 too. Lossy: a block's
            output is a relative .01 to .02 off with random weights, .01 to .03 in MiniLM, at tau = 0 as
            well. On GPUs calls of up to 64 tokens do, weights alone being rounded, with one scale a neuron:
            .01 to .02 off with random inputs. There copies are made when a graph is compiled for inference,
            or first called with a site's weights. Routing, calls of more tokens, training, and blocks that
            no such kernel runs are as without.
        trainable: whether the weights may change, as in fine-tuning; turns off the check that they
            are still those of the conversion.
    """

    conversion: Conversion | str | PathLike[str] | None = None
    tau: float | None = None
    strict: bool = True
    inner: str = "inductor"
    pack: bool = True
    int8: bool = False
    trainable: bool = False

    def __post_init__(self) -> None:
        if self.tau is not None:
            check_tau(self.tau)
        for name in ("strict", "pack", "int8", "trainable"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"Option {name!r} is {getattr(self, name)!r}; expected a bool.")
        if self.inner not in INNER:
            raise OptionError(
                f"Option 'inner' is {self.inner!r}; expected one of {', '.join(INNER)}."
            )
        if not isinstance(self.conversion, (Conversion, str, PathLike, type(None))):
            raise OptionError(
                f"Option 'conversion' is a {type(self.conversion).__name__}; expected a Conversion or "
                "the folder that Conversion.save wrote."
            )

    @classmethod
    def parse(
        cls, given: Mapping[str, Any] | None, mode: str | None, others: Mapping[str, Any]
    ) -> Options:
        """What torch.compile passes on: options each known and of its type, and a mode that fits.

        others: arguments that the backend has no name for. OptionError says what is refused.
        """
        if others:
            raise OptionError(f"Unknown argument {sorted(others)} for backend 'd2dmoe'.")
        if mode not in (None, *MODES):
            raise OptionError(f"mode is {mode!r}; expected one of {', '.join(MODES)}.")
        given = given or {}
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise OptionError(
                f"Unknown option {', '.join(map(repr, unknown))} for backend 'd2dmoe'; "
                f"expected some of: {', '.join(known)}."
            )
        chosen = cls(**given)
        if mode not in (None, "default") and chosen.inner != "inductor":
            raise OptionError(f"mode {mode!r} needs inner 'inductor', not {chosen.inner!r}.")
        return chosen
