"""Save and load a conversion as a sidecar: `d2dmoe.json` + `d2dmoe.safetensors`, and no pickle.

The JSON holds sites, plans, taus, the SHA-256 of the dense weights they belong to, a manifest with
shape, dtype and SHA-256 of every tensor in the safetensors file (routers and permutations), and the
SHA-256 of its own content, so that a flipped digit of a tau is noticed. Loading trusts nothing: unknown
and missing keys, duplicate keys, wrong types, values out of range, tensors that do not fit the manifest
or each other, and files that lead out of the folder are all ArtifactErrors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from .attachment import check_tau
from .config import Config
from .errors import ArtifactError, D2DError
from .expr import function, parse
from .ir import Conversion, Experts, Plan, Site
from .layout import digest

FORMAT = "d2dmoe"
VERSION = 1
JSON_NAME = "d2dmoe.json"
TENSORS_NAME = "d2dmoe.safetensors"
PARTS = (None, "q", "k", "v", "o", "qk", "kv", "qkv")
TENSORS = ("permutation", "router1", "router2")
KEYS = ("format", "version", "config", "dense", "sites", "tensors", "sha256")
MAX_JSON = 64 << 20  # bytes; a site takes about 3 kB
ROLES = {
    "ffn": ({"up", "down"},),
    "glu": ({"gate", "up", "down"}, {"gate_up", "down"}),
    "projection": ({"weight"},),
}


def save(conversion: Conversion, folder: str | os.PathLike[str]) -> None:
    """Write a conversion to a folder, replacing only an earlier conversion's two files there.

    Both files are written to a fresh folder beside it first and moved at the end, tensors before JSON,
    so that a crash leaves either the old pair or a pair whose hashes do not fit and is refused.
    """
    target = Path(folder)
    tensors: dict[str, Tensor] = {}
    for name, experts in conversion.experts.items():
        for part in TENSORS:
            # A copy each, because safetensors refuses tensors that share memory.
            tensors[f"{name}.{part}"] = getattr(experts, part).detach().cpu().contiguous().clone()
    document = {
        "format": FORMAT,
        "version": VERSION,
        "config": asdict(conversion.config),
        "dense": dict(conversion.dense),
        "sites": [_site_json(experts) for experts in conversion.experts.values()],
        "tensors": {name: _entry(tensor) for name, tensor in sorted(tensors.items())},
    }
    document["sha256"] = _content(document)
    target.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".d2dmoe-", dir=target))
    try:
        save_file(tensors, fresh / TENSORS_NAME)
        text = json.dumps(document, indent=1, allow_nan=False)
        (fresh / JSON_NAME).write_text(text, encoding="utf-8")
        for name in (TENSORS_NAME, JSON_NAME):
            os.chmod(fresh / name, 0o644)
            os.replace(fresh / name, target / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load(folder: str | os.PathLike[str]) -> Conversion:
    """Read a conversion that `Conversion.save` wrote; attach it with `.attach(model)`.

    Raises ArtifactError saying which file and field was seen, and what was expected.
    """
    document = _read_json(_inside(Path(folder), JSON_NAME))
    kind, version = document.get("format"), document.get("version")
    if kind != FORMAT or type(version) is not int or version != VERSION:
        raise ArtifactError(
            f"{JSON_NAME} is {kind!r} version {version!r}; expected {FORMAT!r} version {VERSION}. "
            "Convert again with this version of d2dcompile."
        )
    _keys(document, KEYS, JSON_NAME)
    if document["sha256"] != _content(document):
        raise ArtifactError(
            f"{JSON_NAME} does not have the content that its sha256 was made of. The artifact is "
            "damaged or was edited; copy or convert it again, and use set_tau() to change a tau."
        )
    tensors = _read_tensors(_inside(Path(folder), TENSORS_NAME), document["tensors"])
    given = _strings(document["config"], "config")
    _keys(given, tuple(field.name for field in fields(Config)), "config")
    try:
        check_tau(given["tau"])
        config = Config(**given)
    except (TypeError, D2DError) as error:
        raise ArtifactError(f"{JSON_NAME}: config is refused: {error}") from None
    dense = _strings(document["dense"], "dense")
    if not all(isinstance(reason, str) for reason in dense.values()):
        raise ArtifactError(f"{JSON_NAME}: dense is not a mapping from site names to reasons.")
    experts: dict[str, Experts] = {}
    for item in _list(document["sites"], "sites"):
        one = _experts(item, tensors)
        experts[one.site.name] = one
    if tensors:
        raise ArtifactError(f"{TENSORS_NAME} has tensors of no site: {', '.join(sorted(tensors))}.")
    return Conversion(experts, dense, config)


def _inside(folder: Path, name: str) -> Path:
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


def _read_json(path: Path) -> dict[str, Any]:
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
    return _strings(document, JSON_NAME)


def _content(document: Mapping[str, Any]) -> str:
    """SHA-256 of all of a document but its own "sha256", whatever the layout and order of keys."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _read_tensors(path: Path, manifest: Any) -> dict[str, Tensor]:
    """The tensors of the file, which have to be exactly those of the manifest, bit for bit."""
    try:
        tensors = load_tensors(path.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise ArtifactError(f"{path} is not a valid safetensors file: {error}.") from None
    manifest = _strings(manifest, "tensors")
    if set(manifest) != set(tensors):
        differ = sorted(set(manifest) ^ set(tensors))
        raise ArtifactError(f"{path} and the manifest differ in: {', '.join(differ)}.")
    for name, tensor in tensors.items():
        found = _entry(tensor)
        if manifest[name] != found:
            raise ArtifactError(
                f"{path}: tensor {name} is {found}, the manifest says {manifest[name]}. The artifact "
                "is damaged; copy or convert it again."
            )
    return dict(tensors)


def _entry(tensor: Tensor) -> dict[str, Any]:
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": digest(tensor),
    }


def _site_json(experts: Experts) -> dict[str, Any]:
    site = {field.name: getattr(experts.site, field.name) for field in fields(Site)}
    site.update(params=dict(experts.site.params), biases=dict(experts.site.biases))
    return {
        "site": site,
        "plan": asdict(experts.plan),
        "tau": experts.tau,
        "hashes": {role: dict(known) for role, known in experts.hashes.items()},
        "stats": dict(experts.stats),
    }


def _experts(item: Any, tensors: dict[str, Tensor]) -> Experts:
    """One site's experts from its JSON, taking its tensors out of the mapping."""
    item = _strings(item, "a site")
    _keys(item, ("site", "plan", "tau", "hashes", "stats"), "a site")
    site = _site(item["site"])
    plan = _strings(item["plan"], "plan")
    _keys(plan, ("experts", "expert_size", "router_width"), f"the plan of {site.name}")
    if any(type(value) is not int or value < 1 for value in plan.values()):
        raise ArtifactError(
            f"{JSON_NAME}: the plan of {site.name!r} is {plan}; expected integers >= 1."
        )
    stats = _strings(item["stats"], "stats")
    if any(type(value) not in (int, float) for value in stats.values()):
        raise ArtifactError(f"{JSON_NAME}: the stats of {site.name!r} are not all numbers.")
    try:
        tau = check_tau(item["tau"])
    except D2DError as error:
        raise ArtifactError(f"{JSON_NAME}: site {site.name!r}: {error}") from None
    missing = [part for part in TENSORS if f"{site.name}.{part}" not in tensors]
    if missing:
        raise ArtifactError(
            f"{TENSORS_NAME} lacks {', '.join(missing)} of site {site.name!r}, or it occurs twice."
        )
    parts = {part: tensors.pop(f"{site.name}.{part}") for part in TENSORS}
    experts = Experts(
        site, Plan(**plan), tau=tau, hashes=_hashes(item["hashes"], site), stats=stats, **parts
    )
    _check(experts)
    return experts


def _site(value: Any) -> Site:
    value = {"interleaved": False, **_strings(value, "site")}  # older files lack it
    _keys(value, tuple(field.name for field in fields(Site)), "a site")
    kind = value["kind"]
    texts = ("name", "kind", "activation")
    if any(not isinstance(value[key], str) for key in texts) or kind not in ROLES:
        raise ArtifactError(f"{JSON_NAME}: a site is {value}; expected name, kind and activation.")
    for key in ("params", "biases"):
        if not all(isinstance(v, str) for v in _strings(value[key], key).values()):
            raise ArtifactError(f"{JSON_NAME}: {key} of {value['name']!r} are not all names.")
    roles = set(value["params"])
    scalars = {role for role in value["biases"] if re.fullmatch(r"p[0-9]+", role)}
    if roles not in ROLES[kind] or not set(value["biases"]) <= roles | scalars:
        raise ArtifactError(
            f"{JSON_NAME}: {value['name']!r} of kind {kind!r} has roles {sorted(roles)}."
        )
    for key in ("d_model", "d_hidden", "calls"):
        if type(value[key]) is not int or value[key] < 1:
            raise ArtifactError(f"{JSON_NAME}: {key} of {value['name']!r} is {value[key]!r}.")
    for key in ("transposed", "halves"):
        if not all(isinstance(v, str) for v in _list(value[key], key)):
            raise ArtifactError(f"{JSON_NAME}: {key} of {value['name']!r} are not all names.")
    value = {**value, "transposed": tuple(value["transposed"]), "halves": tuple(value["halves"])}
    halves = ["gate", "up"] if "gate_up" in roles else []
    if not set(value["transposed"]) <= roles or sorted(value["halves"]) != halves:
        raise ArtifactError(f"{JSON_NAME}: transposed or halves of {value['name']!r} do not fit.")
    if value["interleaved"] is not False and (value["interleaved"] is not True or not halves):
        raise ArtifactError(f"{JSON_NAME}: interleaved of {value['name']!r} does not fit.")
    share = value["share"]
    if type(share) not in (int, float) or not 0 <= share <= 1 or value["role"] not in PARTS:
        raise ArtifactError(f"{JSON_NAME}: share or role of {value['name']!r} is out of range.")
    if kind != "projection":
        _activation(value["activation"], {"up", *({"gate"} if kind == "glu" else ()), *scalars})
    return Site(**value)


def _activation(text: str, variables: set[str]) -> None:
    """Refuse a text that is no elementwise function of these variables; a tiny trial run.

    It may read further scalars p0, p1, ...: buffers, which a graph passes to the experts itself.
    """
    try:
        found = parse(text).variables()
        variables = variables | {name for name in found if re.fullmatch(r"p[0-9]+", name)}
        missing = variables ^ found
        if missing:
            raise ArtifactError(f"{JSON_NAME}: {text!r} and its site differ in {sorted(missing)}.")
        function(text)({name: torch.ones(2, 3) for name in variables})
    except ArtifactError:
        raise
    except (D2DError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ArtifactError(f"{JSON_NAME}: activation {text!r} is refused: {error}") from None


def _hashes(value: Any, site: Site) -> Mapping[str, Any]:
    """The recorded digests, one entry per tensor of the site."""
    hashes = _strings(value, "hashes")
    _keys(hashes, tuple(site.tensors), f"the hashes of {site.name}")
    for role, known in hashes.items():
        _keys(_strings(known, role), ("shape", "dense", "permuted"), f"the hashes of {site.name}")
        if any(type(size) is not int for size in _list(known["shape"], "shape")):
            raise ArtifactError(f"{JSON_NAME}: a shape of {site.name!r} is {known['shape']}.")
        for kind in ("dense", "permuted"):
            for text in _strings(known[kind], kind).values():
                if not isinstance(text, str) or not re.fullmatch(r"[0-9a-f]{64}", text):
                    raise ArtifactError(f"{JSON_NAME}: {text!r} in {site.name!r} is no SHA-256.")
    return hashes


def _check(experts: Experts) -> None:
    """Shapes, dtypes and values of one site's tensors against its plan."""
    site, plan, name = experts.site, experts.plan, experts.site.name
    if plan.experts * plan.expert_size != site.d_hidden:
        raise ArtifactError(
            f"{JSON_NAME}: {name!r} has {plan.experts} experts of {plan.expert_size} neurons; expected "
            f"{site.d_hidden} in all."
        )
    shapes = {
        "permutation": (site.d_hidden,),
        "router1": (plan.router_width, site.d_model),
        "router2": (plan.experts, plan.router_width),
    }
    for part, shape in shapes.items():
        tensor: Tensor = getattr(experts, part)
        dtype = torch.int64 if part == "permutation" else torch.float32
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ArtifactError(
                f"{TENSORS_NAME}: {name}.{part} is {tensor.dtype} {tuple(tensor.shape)}; expected "
                f"{dtype} {shape}."
            )
        if not tensor.isfinite().all():
            raise ArtifactError(f"{TENSORS_NAME}: {name}.{part} holds NaN or infinity.")
    if not torch.equal(experts.permutation.sort().values, torch.arange(site.d_hidden)):
        raise ArtifactError(f"{TENSORS_NAME}: {name}.permutation is no permutation.")


def _strings(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArtifactError(f"{JSON_NAME}: {what} is a {type(value).__name__}; expected an object.")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ArtifactError(f"{JSON_NAME}: {what} is a {type(value).__name__}; expected a list.")
    return value


def _keys(value: Mapping[str, Any], expected: tuple[str, ...], what: str) -> None:
    if set(value) != set(expected):
        unknown, missing = sorted(set(value) - set(expected)), sorted(set(expected) - set(value))
        raise ArtifactError(
            f"{JSON_NAME}: {what} has unknown keys {unknown} and lacks {missing}; expected exactly "
            f"{sorted(expected)}."
        )
