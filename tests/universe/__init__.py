"""Models with hand-written truth about their feed-forward blocks and attention projections."""

from __future__ import annotations

from .case import Case, Truth


def all_cases() -> list[Case]:
    """Every case of the universe: Hugging Face models, torch.nn layers, forms and decoys."""
    from . import decoys, forms, hf, layers

    found = [*layers.cases(), *forms.cases(), *decoys.cases()]
    return [*found, *hf.cases()]


__all__ = ["Case", "Truth", "all_cases"]
