"""Markdown tables from the JSON of benchmarks/models.py, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import groups


def tables(found: Mapping[str, Any]) -> str:
    """One table of the models at a forced share, one of MiniLM at each tau."""
    lines = [
        f"{found['machine']['cpu']}, {found['machine']['threads']} threads, "
        f"torch {found['versions']['torch']}; `{found['command']}`."
    ]
    whole = {name: group for name, group in found["groups"].items() if "figures" in group}
    swept = {name: group for name, group in found["groups"].items() if "taus" in group}
    if whole:
        lines += ["", *_models(whole)]
    for group in swept.values():
        lines += ["", f"MiniLM, a batch of {group['shape']} tokens:", "", *_taus(group)]
        if any(map(_hidden, group["taus"])):
            lines += ["", "* chosen by the gates; kernels run all experts of blocks that skip few."]
    return "\n".join([*lines, *groups.not_timed(found)])


def _models(models: Mapping[str, Any]) -> Iterator[str]:
    """Times in ms; attained: of what the blocks' gain predicts; of ceiling: with the best forms after /."""
    names = ("eager", "compile", "frozen", "d2dmoe", "d2dmoe frozen")
    yield (
        f"| model | executed | {' | '.join(f'{name} ms' for name in names)} | vs compile | "
        "best vs best dense | predicted ms | attained | ceiling | of ceiling |"
    )
    yield "|" + "---|" * 13
    for name, group in models.items():
        of_ceiling = [f"{group[k]:.2f}" for k in ("of_ceiling", "of_ceiling_best") if k in group]
        cells = [
            f"{group['executed']:.1%}",
            *(_ms(group["figures"].get(name)) for name in names),
            _times(group.get("speedup")),
            f"{_times(group.get('speedup_best'))} ({group.get('best_dense', '-')})",
            f"{group['predicted_ms']:.1f}" if "predicted_ms" in group else "-",
            f"{group['attained']:.2f}" if "attained" in group else "-",
            _times(group.get("ceiling")),
            " / ".join(of_ceiling) or "-",
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def _taus(group: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "| tau | executed | cosine to dense | R@1 | d2dmoe ms | compile ms | eager ms | "
        "vs compile | vs eager |"
    )
    yield "|" + "---|" * 9
    for row in group["taus"]:
        figures = row["figures"]
        cells = [
            f"{row['tau']:g}",
            f"{row['executed']:.1%}{'*' * _hidden(row)}",
            f"{row['cosine']:.4f}",
            f"{row['recall']:.3f}",
            *(_ms(figures.get(name)) for name in ("d2dmoe", "compile", "eager")),
            _times(row.get("vs_compile")),
            _times(row.get("vs_eager")),
        ]
        yield f"| {' | '.join(cells)} |"


def _hidden(row: Mapping[str, Any]) -> bool:
    """Whether kernels ran more experts than the gates chose."""
    return bool(row["tau"] > 0 and row["whole_blocks"])


def _ms(row: Mapping[str, Any] | None) -> str:
    """A time, ~ where other processes disturbed it."""
    return "-" if row is None else f"{'~' if row['noisy'] else ''}{row['ms']:.1f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
