"""Load the sidecar that `d2dcompile.artifact` saves, trusting nothing of its two files.

Unknown and missing keys, duplicate keys, wrong types, values out of range, tensors that do not fit the
manifest or each other, and files that lead out of the folder are all ArtifactErrors.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from .artifact import FORMAT, JSON_NAME, KEYS, TENSORS_NAME, VERSION, digest_of, entry
from .errors import ArtifactError
from .ir import Conversion, Experts
from .validating import check_keys, check_list, check_object, config_of, dense_of, experts_of

MAX_JSON = 64 << 20  # bytes; a site takes about 3 kB


def load(folder: str | os.PathLike[str]) -> Conversion:
    """Read a conversion that `Conversion.save` wrote; attach it with `.attach(model)`.

    Raises ArtifactError saying which file and field was seen, and what was expected.
    """
    document = read_json(inside(Path(folder), JSON_NAME))
    kind, version = document.get("format"), document.get("version")
    if kind != FORMAT or type(version) is not int or version != VERSION:
        raise ArtifactError(
            f"{JSON_NAME} is {kind!r} version {version!r}; expected {FORMAT!r} version {VERSION}. "
            "Convert again with this version of d2dcompile."
        )
    check_keys(document, KEYS, JSON_NAME)
    if document["sha256"] != digest_of(document):
        raise ArtifactError(
            f"{JSON_NAME} does not have the content that its sha256 was made of. The artifact is "
            "damaged or was edited; copy or convert it again, and use set_tau() to change a tau."
        )
    tensors = read_tensors(inside(Path(folder), TENSORS_NAME), document["tensors"])
    config, dense = config_of(document["config"]), dense_of(document["dense"])
    experts: dict[str, Experts] = {}
    owners: dict[str, Experts] = {}
    for item in check_list(document["sites"], "sites"):
        one = experts_of(item, tensors, owners)
        experts[one.site.name] = one
    if tensors:
        raise ArtifactError(f"{TENSORS_NAME} has tensors of no site: {', '.join(sorted(tensors))}.")
    return Conversion(experts, dense, config)


def inside(folder: Path, name: str) -> Path:
    """The file of that name, which has to lie in the folder itself or in a Hub cache's blobs."""
    path = folder / name
    try:
        found = path.is_file()
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError):  # names too long, loops of links, null bytes
        found = False
    if not found:
        raise ArtifactError(
            f"{folder} has no file {name}; expected the folder that Conversion.save wrote."
        )
    blobs = [up.parent / "blobs" for up in home.parents if up.name == "snapshots"]
    if real.parent not in (home, *blobs):
        raise ArtifactError(f"{path} leads out of its folder, to {real}; expected a file inside.")
    return real


def read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes; expected at most {MAX_JSON}.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ArtifactError(f"{path} has a duplicate key among {[key for key, _ in pairs]}.")
        return found

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ArtifactError(f"{path} holds {text}; expected finite numbers.")
        return float(text)

    def whole(text: str) -> int:
        if len(text) > 20:  # digits and sign of a 64-bit integer
            raise ArtifactError(f"{path} holds {text[:20]}...; expected integers of 64 bits.")
        return int(text)

    try:
        document = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=unique,
            parse_constant=finite,
            parse_float=finite,
            parse_int=whole,
        )
    except ArtifactError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}.") from None
    return check_object(document, JSON_NAME)


def read_tensors(path: Path, manifest: Any) -> dict[str, Tensor]:
    """The tensors of the file, which have to be exactly those of the manifest, bit for bit."""
    try:
        tensors = load_tensors(path.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise ArtifactError(f"{path} is not a valid safetensors file: {error}.") from None
    manifest = check_object(manifest, "tensors")
    if set(manifest) != set(tensors):
        differ = sorted(set(manifest) ^ set(tensors))
        raise ArtifactError(f"{path} and the manifest differ in: {', '.join(differ)}.")
    for name, tensor in tensors.items():
        found = entry(tensor)
        if manifest[name] != found:
            raise ArtifactError(
                f"{path}: tensor {name} is {found}, the manifest says {manifest[name]}. The artifact "
                "is damaged; copy or convert it again."
            )
    return dict(tensors)
