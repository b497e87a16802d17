"""The config and the sites of an artifact from its JSON and tensors, each value checked.

Raises ArtifactError for whatever `d2dcompile.artifact` would not have written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .artifact import JSON_NAME, OWN, TENSORS, TENSORS_NAME
from .config import Config, check_tau
from .errors import ArtifactError, D2DError
from .expr import function, parse
from .ir import Experts, Plan, Site
from .rules import check_rule, check_value

PARTS = (None, "q", "k", "v", "o", "qk", "kv", "qkv")
ROLES = {
    "ffn": ({"up", "down"},),
    "glu": ({"gate", "up", "down"}, {"gate_up", "down"}),
    "projection": ({"weight"},),
}


def config_of(value: Any) -> Config:
    """The configuration that made the conversion."""
    later = ("rule", "rule_value", "shared_experts", "router", "router_patience")
    given = check_object(value, "config")
    if given.keys().isdisjoint(later):  # an older file, which lacks all of them
        given = given | {f.name: f.default for f in fields(Config) if f.name in later}
    # Nor was there anything to share, or to leave out.
    given = {"share_routers": False, "exclude": (), **given}
    check_keys(given, tuple(field.name for field in fields(Config)), "config")
    try:
        check_tau(given["tau"])
        return Config(**given)
    except (TypeError, D2DError) as error:
        raise ArtifactError(f"{JSON_NAME}: config is refused: {error}") from None


def dense_of(value: Any) -> dict[str, str]:
    """{site name: reason} of the sites that stay dense."""
    dense = check_object(value, "dense")
    if not all(isinstance(reason, str) for reason in dense.values()):
        raise ArtifactError(f"{JSON_NAME}: dense is not a mapping from site names to reasons.")
    return dense


def experts_of(item: Any, tensors: dict[str, Tensor], owners: dict[str, Experts]) -> Experts:
    """One site's experts from its JSON, taking its tensors out of the mapping.

    owners: earlier sites with a first router layer of their own, by name, to which this one is added.
    """
    item = {"rule": "max", "router1": None, **check_object(item, "a site")}
    check_keys(item, ("site", "plan", "tau", "rule", "router1", "hashes", "stats"), "a site")
    site = _site(item["site"])
    plan = check_object(item["plan"], "plan")
    check_keys(plan, ("experts", "expert_size", "router_width"), f"the plan of {site.name}")
    if any(type(value) is not int or value < 1 for value in plan.values()):
        raise ArtifactError(
            f"{JSON_NAME}: the plan of {site.name!r} is {plan}; expected integers >= 1."
        )
    stats = check_object(item["stats"], "stats")
    if any(type(value) not in (int, float) for value in stats.values()):
        raise ArtifactError(f"{JSON_NAME}: the stats of {site.name!r} are not all numbers.")
    try:
        rule = check_rule(item["rule"])
        tau = check_value(rule, item["tau"])
    except D2DError as error:
        raise ArtifactError(f"{JSON_NAME}: site {site.name!r}: {error}") from None
    owner = item["router1"]
    if owner is not None and (not isinstance(owner, str) or owner not in owners):
        raise ArtifactError(
            f"{JSON_NAME}: the router1 of {site.name!r} is that of {owner!r}; expected an earlier site with "
            "one of its own."
        )
    own = TENSORS if owner is None else OWN
    missing = [part for part in own if f"{site.name}.{part}" not in tensors]
    if missing:
        raise ArtifactError(
            f"{TENSORS_NAME} lacks {', '.join(missing)} of site {site.name!r}, or it occurs twice."
        )
    parts = {part: tensors.pop(f"{site.name}.{part}") for part in own}
    if owner is not None:
        parts["router1"] = owners[owner].router1
    experts = Experts(
        site, Plan(**plan), tau=tau, rule=rule, hashes=_hashes(item["hashes"], site), stats=stats,
        **parts,
    )  # fmt: skip
    _check(experts)
    if owner is None:
        owners[site.name] = experts
    return experts


def _site(value: Any) -> Site:
    value = check_object(value, "site")
    value = {"interleaved": False, "d_out": value.get("d_model"), **value}  # older files lack them
    check_keys(value, tuple(field.name for field in fields(Site)), "a site")
    kind = value["kind"]
    texts = ("name", "kind", "activation")
    if any(not isinstance(value[key], str) for key in texts) or kind not in ROLES:
        raise ArtifactError(f"{JSON_NAME}: a site is {value}; expected name, kind and activation.")
    for key in ("params", "biases"):
        if not all(isinstance(v, str) for v in check_object(value[key], key).values()):
            raise ArtifactError(f"{JSON_NAME}: {key} of {value['name']!r} are not all names.")
    roles = set(value["params"])
    scalars = {role for role in value["biases"] if re.fullmatch(r"p[0-9]+", role)}
    if roles not in ROLES[kind] or not set(value["biases"]) <= roles | scalars:
        raise ArtifactError(
            f"{JSON_NAME}: {value['name']!r} of kind {kind!r} has roles {sorted(roles)}."
        )
    for key in ("d_model", "d_hidden", "d_out", "calls"):
        if type(value[key]) is not int or value[key] < 1:
            raise ArtifactError(f"{JSON_NAME}: {key} of {value['name']!r} is {value[key]!r}.")
    for key in ("transposed", "halves"):
        if not all(isinstance(v, str) for v in check_list(value[key], key)):
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
    hashes = check_object(value, "hashes")
    check_keys(hashes, tuple(site.tensors), f"the hashes of {site.name}")
    for role, known in hashes.items():
        check_keys(
            check_object(known, role), ("shape", "dense", "permuted"), f"the hashes of {site.name}"
        )
        if any(type(size) is not int for size in check_list(known["shape"], "shape")):
            raise ArtifactError(f"{JSON_NAME}: a shape of {site.name!r} is {known['shape']}.")
        for kind in ("dense", "permuted"):
            for text in check_object(known[kind], kind).values():
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
        shared = tensor.isnan().all(-1) if part == "router2" else tensor.new_zeros(()).bool()
        if not tensor[~shared].isfinite().all() or shared.all():
            raise ArtifactError(f"{TENSORS_NAME}: {name}.{part} holds NaN or infinity.")
    if not torch.equal(experts.permutation.sort().values, torch.arange(site.d_hidden)):
        raise ArtifactError(f"{TENSORS_NAME}: {name}.permutation is no permutation.")


def check_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArtifactError(f"{JSON_NAME}: {what} is a {type(value).__name__}; expected an object.")
    return value


def check_list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ArtifactError(f"{JSON_NAME}: {what} is a {type(value).__name__}; expected a list.")
    return value


def check_keys(value: Mapping[str, Any], expected: tuple[str, ...], what: str) -> None:
    if set(value) != set(expected):
        unknown, missing = sorted(set(value) - set(expected)), sorted(set(expected) - set(value))
        raise ArtifactError(
            f"{JSON_NAME}: {what} has unknown keys {unknown} and lacks {missing}; expected exactly "
            f"{sorted(expected)}."
        )
