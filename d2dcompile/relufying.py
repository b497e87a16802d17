"""relufy: ReLU in the place of the activation functions of feed-forward blocks, at once or by and by.

The matcher says what a site's activation computes; the attribute of a module near its first projection
that computes the same is where it is replaced, be it a module or a function. Whether that was it, the
matcher says again afterwards.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from .capture import unwrap
from .errors import D2DWarning, SparsifyError
from .injecting import is_penalised
from .locating import Seen, locate
from .relu_config import Field, fields, set_field
from .replacing import Annealed, Place, is_sparse, place_at, place_of, unreachable
from .stepping import Clock, positive


class Relufied:
    """A model whose activations are ReLU or on the way there. Made by `relufy`.

    Attributes:
        places: paths of the replaced attributes, e.g. "encoder.layer.0.intermediate.intermediate_act_fn".
        also: those of them outside of sites, which the same field of the model's configuration governs.
        fields: that configuration's fields, set to ReLU once annealing has ended.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Sequence[Place],
        also: Sequence[Place],
        found: Sequence[Field],
        anneal_steps: int | None,
    ) -> None:
        self.places = tuple(place.key for place in (*places, *also))
        self.also = tuple(place.key for place in also)
        self.fields = tuple(field.name for field in found)
        self._steps = 0
        self._places = (*places, *also)
        self._model = weakref.ref(model)
        self._config = found
        self._anneal_steps = anneal_steps if self._places else None
        self._annealed: list[Annealed] = []
        self._clock = Clock(model, self._tick)
        if self._anneal_steps is None:
            self._finish()
            return
        device = next(model.parameters()).device
        for place in self._places:
            self._annealed.append(Annealed(place.original, device))
            place.put(self._annealed[-1])
        _ANNEALING[model] = self

    @property
    def amount(self) -> float:
        """How much of the mix is ReLU, 0 to 1."""
        return min(self.steps / self._anneal_steps, 1.0) if self._anneal_steps else 1.0

    @property
    def steps(self) -> int:
        """Optimizer steps so far; set it when training resumes. At the last one annealing ends."""
        return self._steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._steps = value
        for module in self._annealed:
            module.amount.fill_(self.amount)
        if self._annealed and self.amount == 1.0:
            self._finish()

    def __str__(self) -> str:
        lines = [
            f"{key}{'  (governed by the same field)' * (key in self.also)}" for key in self.places
        ]
        named = f"; sets {', '.join(self.fields)}" if self.fields else ""
        return "\n".join([*lines, f"{self.amount:.0%} ReLU at step {self.steps}{named}"])

    def step(self) -> None:
        """Count an optimizer step by hand; none is counted automatically from the first call on."""
        self._clock.stop()
        self._tick()

    def remove(self) -> None:
        """Put the original activation functions and configuration back."""
        self._end()
        for place in self._places:
            place.restore()
        self._say("before")

    def _tick(self) -> None:
        self.steps += 1

    def _end(self) -> None:
        self._clock.stop()
        self._annealed.clear()
        model = self._model()
        if model is not None:
            _ANNEALING.pop(model, None)

    def _finish(self) -> None:
        self._end()
        for place in self._places:
            place.finish()
        self._say("after")

    def _say(self, when: str) -> None:
        """Set the configuration's fields to what they are "before" or "after"."""
        model = self._model()
        if model is not None:
            for field in self._config:
                set_field(model, field, getattr(field, when))


# Annealing goes on when nobody keeps what `relufy` returned, as long as the model lives.
_ANNEALING: weakref.WeakKeyDictionary[nn.Module, Relufied] = weakref.WeakKeyDictionary()


def relufy(model: nn.Module, example: Any, anneal_steps: int | None = None) -> Relufied:
    """Replace the activation functions of a model's feed-forward blocks by ReLU, in place.

    In gated blocks that of the gate. Blocks whose function is zero below zero already are left alone.
    Where a Hugging Face configuration has a field for it, that is set too, so that `save_pretrained`
    writes a model with ReLU; activations elsewhere that only the same field can say (BERT's masked-LM
    head) become ReLU as well, and are listed.

    Args:
        example: what the model is called with, as one batch of `convert`; it runs to find the sites.
        anneal_steps: optimizer steps over which a mix (1 - t) act + t relu goes from t = 0 to 1, counted
            by a hook on the optimizer; None: at once. Weights saved before its end are those of a mix that
            no configuration describes.

    Call `relufy` before `sparsify`. Raises SparsifyError, naming the site and its source line, where
    the activation is written out or called as a function that is no attribute; the model is then as before.
    """
    if anneal_steps is not None:
        positive("anneal_steps", anneal_steps, "optimizer steps to anneal over, or None")
    plain = unwrap(model)
    if is_penalised(plain):
        raise SparsifyError(
            "The model is being sparsified for its present activations; expected relufy() before "
            "sparsify(). Call remove() of what sparsify() returned first."
        )
    wanted = [seen for seen in locate(model, example) if not is_sparse(seen)]
    places = list({place.key: place for place in (place_of(plain, s) for s in wanted)}.values())
    found = fields(plain, {place.key for place in places})
    governed = {key for field in found for key in field.governs}
    also = [
        place
        for key in sorted(governed - {place.key for place in places})
        if (place := place_at(plain, key)) is not None
    ]
    _check(model, example, wanted, [*places, *also])
    unsaid = sorted({place.key for place in places} - governed)
    if unsaid and hasattr(plain, "save_pretrained"):
        warnings.warn(
            f"No field of {type(plain.config).__name__} says what {unsaid[0]} is: a saved model will "
            "load with the original activation there. Call relufy on the loaded model again.",
            D2DWarning,
            stacklevel=2,
        )
    return Relufied(plain, places, also, found, anneal_steps)


def _check(model: nn.Module, example: Any, wanted: Sequence[Seen], places: Sequence[Place]) -> None:
    """See that the sites' activations are ReLU once the places hold it, and put them back.

    Raises SparsifyError for the first site where they are not.
    """
    try:
        for place in places:
            place.finish()
        after = {seen.site.name: seen for seen in locate(model, example)} if wanted else {}
    finally:
        for place in places:
            place.restore()
    for seen in wanted:
        now = after.get(seen.site.name)
        if now is None or not is_sparse(now):
            raise unreachable(seen, "the attribute that computes the same is not what it calls")
