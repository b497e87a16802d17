"""The command line: d2dcompile tune | bench, each with --json.

    d2dcompile tune FOLDER                        tune the kinds of blocks of a saved conversion
    d2dcompile tune "768x3072 gelu(up) bf16"      ... of a shape, without a conversion
    d2dcompile tune FOLDER --precompile-only --target sm_90     compile for a GPU that is not here
    d2dcompile tune show | export FILE | import FILE
    d2dcompile bench FOLDER|SHAPE --tokens 1 16 --shares 0.1 0.2

Results go to standard output, progress and warnings to standard error; errors end with status 2.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import gpu_tuning, tuning
from .cli_print import print_bench, print_compiled, print_entries
from .config import Config
from .errors import D2DError, TuningError
from .ir import Conversion
from .kernels.native import Spec
from .plan import sized
from .store import STORE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPE = re.compile(r"(\d+)x(\d+)\s+(.+?)(?:\s+(fp32|bf16|fp16))?")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        result: int = given.run(given)
        return result
    except D2DError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("d2dcompile", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument(
        "--dtype",
        choices=DTYPES,
        help="to run in; by default fp32 and bf16, of a conversion on a GPU bf16",
    )
    both.add_argument(
        "--expert-size", type=int, help="of a shape, neurons aimed at; default Config.expert_size"
    )
    both.add_argument("--router-width", type=int, help="of a shape; default Config.router_width")
    both.add_argument("--threads", type=int, help="of the kernels; by default torch's")
    both.add_argument("--json", action="store_true", help="print JSON instead of a table")

    tune = commands.add_parser(
        "tune", parents=[both], help="measure kernels and keep the fastest schedules"
    )
    tune.add_argument(
        "target", help='folder of a conversion, "DxH ACTIVATION [DTYPE]", show, export, import'
    )
    tune.add_argument("file", nargs="?", type=Path, help="of export and import")
    tune.add_argument("--effort", choices=tuning.ROWS, default="quick")
    tune.add_argument(
        "--budget", type=_seconds, default=120.0, help="for example 120s; default 120s"
    )
    tune.add_argument(
        "--device", default="auto", help="cpu, cuda, or auto (the default): a GPU if there is one"
    )
    tune.add_argument(
        "--int8", action="store_true", help="also for few tokens on int8 copies; GPUs only"
    )
    tune.add_argument(
        "--precompile-only", action="store_true", help="compile GPU kernels, measure nothing"
    )
    tune.add_argument(
        "--target",
        dest="architecture",
        default="sm_90",
        help="what to precompile for; default sm_90",
    )
    tune.set_defaults(run=_tune, command="tune")

    bench = commands.add_parser(
        "bench", parents=[both], help="time all candidates beside the dense block"
    )
    bench.add_argument("target", help='folder of a conversion, or "DxH ACTIVATION [DTYPE]"')
    bench.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    bench.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    bench.add_argument(
        "--max-autotune", action="store_true", help="also dense under Inductor's max-autotune"
    )
    bench.set_defaults(run=_bench, command="bench")
    return parser


def _seconds(text: str) -> float:
    number = float(text.removesuffix("s"))
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return number


def _target(given: argparse.Namespace) -> tuple[Conversion | list[Spec], list[torch.dtype]]:
    """What a command is about, and the dtypes that it asks for, none for the usual ones."""
    shape = SHAPE.fullmatch(given.target)
    name = given.dtype or (shape[4] if shape is not None else None)
    dtypes = [DTYPES[name]] if name else []
    if shape is not None:
        config = _config(given)
        return [_shape(shape, bf16, config) for bf16 in (False, True)[: 2 - len(dtypes)]], dtypes
    if not Path(given.target).is_dir():
        raise TuningError(
            f"{given.target!r} is neither the folder of a saved conversion nor a shape such as "
            "'768x3072 gelu(up) bf16' or '2048x5632 silu(gate) * up'."
        )
    from .reading import load

    return load(given.target), dtypes


def _config(given: argparse.Namespace) -> Config:
    """How a shape is split: as `convert` splits a block of it by default, but for what was said."""
    sizes = {"expert_size": given.expert_size, "router_width": given.router_width}
    return Config.from_env(**{name: size for name, size in sizes.items() if size is not None})


def _shape(found: re.Match[str], bf16: bool, config: Config) -> Spec:
    from .expr import parse

    d, hidden, activation = int(found[1]), int(found[2]), found[3]
    parse(activation)
    split = sized(hidden, config) if d and hidden else "there is nothing to compute"
    if isinstance(split, str):
        raise TuningError(
            f"{d}x{hidden}: {split}; expected D features and H hidden neurons that experts of about "
            f"{config.expert_size} divide. Give another --expert-size."
        )
    gated = bool(re.search(r"\bgate\b", activation))
    return Spec(d, d, split.experts, split.expert_size, split.router_width, gated, bf16, activation)


def _threads(given: argparse.Namespace) -> None:
    if given.threads is not None:
        if given.threads < 1:
            raise TuningError(f"--threads is {given.threads}; expected at least 1.")
        torch.set_num_threads(given.threads)


def _tune(given: argparse.Namespace) -> int:
    path = STORE.path
    if given.target in ("show", "export", "import"):
        return _move(given, path)
    _threads(given)
    if given.precompile_only:
        return _precompile(given)
    target, dtypes = _target(given)
    found = tuning.tune(
        target, device=given.device, dtypes=dtypes, effort=given.effort, budget=given.budget,
        int8=given.int8,
    )  # fmt: skip
    entries = [e for held in found.values() for e in (held if isinstance(held, list) else [held])]
    print_entries(entries, given.json)
    print(f"kept in {path}", file=sys.stderr)
    return 0


def _precompile(given: argparse.Namespace) -> int:
    """Compile what a tuning run would time, for a target; nothing is measured or recorded."""
    from .gpu_trial import precompile

    target, dtypes = _target(given)
    done = [
        precompile(spec, load, given.architecture, given.effort)
        for spec in gpu_tuning.specs_of(target, dtypes, given.int8)
        for load in gpu_tuning.loads(spec, given.effort)
    ]
    print_compiled(done, given.json)
    return 0


def _move(given: argparse.Namespace, path: Path) -> int:
    """Show the user's schedules, write them to a file, or take over those of a file."""
    if given.target == "show":
        print_entries(list(STORE.read(path).values()), given.json)
        return 0
    if given.file is None:
        raise TuningError(f"`tune {given.target}` needs the name of a file.")
    source, target = (path, given.file) if given.target == "export" else (given.file, path)
    if not source.exists():
        raise TuningError(f"{source} does not exist; expected a file of schedules.")
    held = STORE.read(source)
    STORE.add(held.values(), target)
    print(f"{len(held)} schedules from {source} to {target}", file=sys.stderr)
    return 0


def _bench(given: argparse.Namespace) -> int:
    _threads(given)
    if any(n < 1 for n in given.tokens) or not all(0 < share <= 1 for share in given.shares):
        raise TuningError("--tokens have to be at least 1 and --shares in 0..1.")
    tables: list[dict[str, Any]] = []
    for spec in tuning.specs_of(*_target(given)):
        rows = tuning.bench(spec, given.tokens, given.shares, autotuned=given.max_autotune)
        tables.append({"spec": asdict(spec), "threads": torch.get_num_threads(), "rows": rows})
        if not given.json:
            print_bench(spec, rows)
    if given.json:
        print(json.dumps(tables, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
