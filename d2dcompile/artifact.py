"""Save a conversion as a sidecar: `d2dmoe.json` + `d2dmoe.safetensors`, and no pickle.

The JSON holds sites, plans, taus, the SHA-256 of the dense weights they belong to, a manifest with
shape, dtype and SHA-256 of every tensor in the safetensors file (routers and permutations; a first router
layer that sites share once, the later ones naming the first site as their "router1"), and the
SHA-256 of its own content, so that a flipped digit of a tau is noticed. `d2dcompile.reading` loads both.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .ir import Conversion, Experts, Site
from .layout import digest
from .state import present

FORMAT = "d2dmoe"
VERSION = 1
JSON_NAME = "d2dmoe.json"
TENSORS_NAME = "d2dmoe.safetensors"
TENSORS = ("permutation", "router1", "router2")
OWN = ("permutation", "router2")  # of a site with the first router layer of an earlier one
KEYS = ("format", "version", "config", "dense", "sites", "tensors", "sha256")


def save(conversion: Conversion, folder: str | os.PathLike[str]) -> None:
    """Write a conversion to a folder, replacing only an earlier conversion's two files there.

    Rules and taus are those set last on a model it is attached to (`set_tau`, `fit_tau`, `set_rule`).
    Both files are written to a fresh folder beside it first and moved at the end, tensors before JSON,
    so that a crash leaves either the old pair or a pair whose hashes do not fit and is refused.
    """
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}  # of first router layers, which several sites may hold
    sites = []
    for name, experts in conversion.experts.items():
        owner = owners.setdefault(id(experts.router1), name)
        sites.append(_site_json(experts) | ({} if owner == name else {"router1": owner}))
        for part in TENSORS if owner == name else OWN:
            # A copy each, because safetensors refuses tensors that share memory.
            tensors[f"{name}.{part}"] = getattr(experts, part).detach().cpu().contiguous().clone()
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "config": asdict(conversion.config),
        "dense": dict(conversion.dense),
        "sites": sites,
        "tensors": {name: entry(tensor) for name, tensor in sorted(tensors.items())},
    }
    write_pair(folder, document, tensors, JSON_NAME, TENSORS_NAME)


def write_pair(
    folder: str | os.PathLike[str],
    document: dict[str, Any],
    tensors: Mapping[str, Tensor],
    json_name: str,
    tensors_name: str,
) -> None:
    """Write a document, with its "sha256" added, and its tensors; replaces files of these names only."""
    document["sha256"] = digest_of(document)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".d2dmoe-", dir=target))
    try:
        save_file(dict(tensors), fresh / tensors_name)
        text = json.dumps(document, indent=1, allow_nan=False)
        (fresh / json_name).write_text(text, encoding="utf-8")
        for name in (tensors_name, json_name):
            os.chmod(fresh / name, 0o644)
            os.replace(fresh / name, target / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def digest_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of all of a document but its own "sha256", whatever the layout and order of keys."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def entry(tensor: Tensor) -> dict[str, Any]:
    """A tensor's line in the manifest."""
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": digest(tensor),
    }


def _site_json(experts: Experts) -> dict[str, Any]:
    rule, number = present(experts)
    site = {field.name: getattr(experts.site, field.name) for field in fields(Site)}
    site.update(params=dict(experts.site.params), biases=dict(experts.site.biases))
    return {
        "site": site,
        "plan": asdict(experts.plan),
        "tau": number,
        **({} if rule == "max" else {"rule": rule}),  # as files were before rules
        "hashes": {role: dict(known) for role, known in experts.hashes.items()},
        "stats": dict(experts.stats),
    }
