"""Artifacts: what is saved comes back bit for bit; whatever else lies in the folder is refused.

Two kinds of harm are told apart. Damage changes bytes without knowing the format. A hostile author
knows it, and seals edited JSON with a fresh digest (`edit`), so every field has to be checked too.
"""

import ast
import json
import random
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import d2dcompile as d2d
from d2dcompile import artifact, reading, testing
from d2dcompile.artifact import JSON_NAME, TENSORS_NAME
from d2dcompile.errors import ArtifactError
from d2dcompile.ir import Conversion, Experts, Plan, Site
from d2dcompile.layout import hashes_of

FLIPS = 200  # sampled positions per file; one load takes about 2 ms
WIDTH, HIDDEN, EXPERTS, ROUTER = 4, 6, 3, 5


def experts(name, kind="ffn", seed=0, **changes):
    """One converted site with random weights."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    shapes = {"down": (WIDTH, HIDDEN), "gate_up": (2 * HIDDEN, WIDTH)}
    roles = {"ffn": ("up", "down"), "glu": ("gate", "up", "down"), "fused": ("gate_up", "down")}[
        kind
    ]
    fused = kind == "fused"
    site = Site(
        name=name,
        kind="ffn" if kind == "ffn" else "glu",
        params={role: f"{name}.{role}.weight" for role in roles},
        biases={roles[-2]: f"{name}.{roles[-2]}.bias", "p0": f"{name}.slope"},
        activation="where(gt(up, 0), up, p0 * up)" if kind == "ffn" else "silu(gate) * up * p0",
        d_model=WIDTH,
        d_hidden=HIDDEN,
        halves=("gate", "up") if fused else (),
        share=0.125,
        calls=2,
    )
    weights = {role: random(*shapes.get(role, (HIDDEN, WIDTH))) for role in roles}
    weights[f"{roles[-2]}.bias"] = random(2 * HIDDEN if fused else HIDDEN)
    weights["p0.bias"] = random(1)
    order = torch.randperm(HIDDEN, generator=generator)
    made = Experts(
        site,
        Plan(EXPERTS, HIDDEN // EXPERTS, ROUTER),
        permutation=order,
        router1=random(ROUTER, WIDTH),
        router2=random(EXPERTS, ROUTER),
        tau=0.1,
        hashes=hashes_of(site, weights, order),
        stats={"loss": 0.1 + 0.2, "tokens": 3},
    )
    return replace(made, **changes)


def converted(*sites):
    sites = sites or (
        experts("layer.0", seed=1),
        experts("layer.1", "glu", seed=2),
        experts("layer.2", "fused", seed=3, tau=0.30000000000000004),
    )
    return Conversion(
        {one.site.name: one for one in sites},
        dense={"layer.9": "d_hidden has no divisor near 32"},
        config=d2d.Config(expert_size=2, router_width=ROUTER, tau=0.1, seed=7),
    )


def same(one, other):
    """Whether two conversions are equal, tensors bit for bit."""
    if (one.dense, one.config, list(one.experts)) != (
        other.dense,
        other.config,
        list(other.experts),
    ):
        return False
    for a, b in zip(one.experts.values(), other.experts.values(), strict=True):
        if (a.site, a.plan, a.tau, a.hashes, a.stats) != (b.site, b.plan, b.tau, b.hashes, b.stats):
            return False
        for part in artifact.TENSORS:
            x, y = getattr(a, part), getattr(b, part)
            if x.dtype != y.dtype or not torch.equal(x, y):
                return False
    return True


@pytest.fixture
def folder(tmp_path):
    converted().save(tmp_path / "saved")
    return tmp_path / "saved"


def edit(folder, change):
    """Apply a change to the JSON document and seal it, as a hostile author would."""
    path = folder / JSON_NAME
    document = json.loads(path.read_text())
    replaced = change(document)
    document = document if replaced is None else replaced
    if isinstance(document, dict) and "sha256" in document:
        document["sha256"] = artifact.digest_of(document)
    path.write_text(json.dumps(document))


def edit_tensors(folder, change):
    """Apply a change to the tensors, with a manifest that fits them and a seal."""
    path = folder / TENSORS_NAME
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    manifest = {name: artifact.entry(tensor) for name, tensor in tensors.items()}
    edit(folder, lambda document: document.update(tensors=manifest))


def refused(folder, match="."):
    with pytest.raises(ArtifactError, match=match):
        d2d.load(folder)


def refused_or_same(folder, original):
    """Damage is noticed or means nothing; any other error, and a silent change, fail the test."""
    try:
        assert same(d2d.load(folder), original)
    except ArtifactError:
        return


def test_comes_back_bit_for_bit(folder):
    loaded = d2d.load(folder)
    assert same(loaded, converted())
    assert all(isinstance(one.site, Site) for one in loaded.experts.values())
    assert sorted(path.name for path in folder.iterdir()) == [JSON_NAME, TENSORS_NAME]


def test_a_conversion_of_nothing_comes_back(tmp_path):
    nothing = Conversion({}, {"layer.0": "too small"})
    nothing.save(tmp_path)
    assert same(d2d.load(tmp_path), nothing)


def test_extreme_values_come_back(tmp_path):
    odd = experts("", tau=0, stats={"tiny": 5e-324, "huge": -1.7976931348623157e308, "zero": -0.0})
    odd.router1[0, 0] = -0.0
    odd.router1[0, 1] = 1e-45
    converted(odd, experts("layer \u00fc\u4e2d.0")).save(tmp_path)
    assert same(d2d.load(tmp_path), converted(odd, experts("layer \u00fc\u4e2d.0")))


def test_routers_that_share_memory_or_have_strides_come_back(tmp_path):
    first = experts("layer.0", seed=1)
    turned = first.router1.t().contiguous().t()
    second = replace(experts("layer.1", seed=1), permutation=first.permutation, router1=turned)
    third = replace(experts("layer.2", seed=1), router2=first.router2.requires_grad_())
    converted(first, second, third).save(tmp_path)
    assert same(d2d.load(tmp_path), converted(first, second, third))


def test_loads_in_a_fresh_process_and_opens_nothing_else(folder):
    """Site names with ../ are names of tensors, never of files: an audit hook sees every open()."""
    converted(experts("../../outside"), experts("/etc/passwd")).save(folder)
    code = """
import sys, torch, d2dcompile as d2d
d2d.load(sys.argv[1])  # whatever the first load imports is imported now
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
conversion = d2d.load(sys.argv[1])
print(*conversion.experts, *opened, sep="\\n")
"""
    run = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, cwd=folder
    )
    names = ["../../outside", "/etc/passwd"]
    files = [str(folder / name) for name in (JSON_NAME, TENSORS_NAME)]
    assert run.stdout.splitlines() == names + files


def test_same_conversion_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        converted().save(tmp_path / name)
    for name in (JSON_NAME, TENSORS_NAME):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    d2d.load(tmp_path / "one").save(tmp_path / "three")
    for name in (JSON_NAME, TENSORS_NAME):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_a_saved_conversion_runs_at_the_numbers_that_were_set_last(tmp_path):
    model = testing.Stack(depth=2)
    conversion = d2d.convert(
        model, [torch.randn(64, 16)], d2d.Config(expert_size=16), progress=False
    )
    first, second = conversion.experts
    d2d.set_tau(model, {first: 0.25})
    d2d.set_rule(model, "top_k", {second: 2})
    del model
    conversion.save(tmp_path)
    torch.manual_seed(0)
    again = d2d.load(tmp_path)
    assert [(e.rule, e.tau) for e in again.experts.values()] == [("max", 0.25), ("top_k", 2.0)]
    assert [(e.rule, e.tau) for e in conversion.experts.values()] == [("max", 0.0)] * 2


def test_saving_replaces_an_earlier_conversion_and_nothing_else(folder):
    (folder / "config.json").write_text("the model's own")
    (folder / "model.safetensors").write_bytes(b"weights")
    later = converted(experts("layer.5", seed=5))
    later.save(folder)
    assert same(d2d.load(folder), later)
    assert (folder / "config.json").read_text() == "the model's own"
    assert len(list(folder.iterdir())) == 4


def test_saving_replaces_a_link_and_not_its_target(folder, tmp_path):
    shutil.move(folder / JSON_NAME, tmp_path / "elsewhere.json")
    before = (tmp_path / "elsewhere.json").read_bytes()
    (folder / JSON_NAME).symlink_to(tmp_path / "elsewhere.json")
    converted(experts("layer.5")).save(folder)
    assert list(d2d.load(folder).experts) == ["layer.5"]
    assert (tmp_path / "elsewhere.json").read_bytes() == before


def test_a_save_that_fails_leaves_the_earlier_conversion(folder):
    broken = converted(experts("layer.0", stats={"loss": float("nan")}))
    with pytest.raises(ValueError, match="JSON"):
        broken.save(folder)
    assert same(d2d.load(folder), converted())
    assert len(list(folder.iterdir())) == 2


def test_half_of_a_newer_save_is_refused(folder, tmp_path):
    """Both orders of a crash between the two files."""
    converted(experts("layer.0", seed=9)).save(tmp_path / "new")
    for name in (JSON_NAME, TENSORS_NAME):
        mixed = shutil.copytree(folder, tmp_path / f"mixed {name}")
        shutil.copy(tmp_path / "new" / name, mixed)
        refused(mixed)


def test_another_layout_of_the_same_json_is_the_same(folder):
    path = folder / JSON_NAME
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True, indent=4))
    assert same(d2d.load(folder), converted())


# Damage: bytes change, the digest stays.


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
def test_flipped_bits_are_refused_or_mean_nothing(folder, name):
    original, path = converted(), folder / name
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(FLIPS):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        refused_or_same(folder, original)


def test_bytes_of_the_tensor_header_are_refused_or_mean_nothing(folder):
    original, path = converted(), folder / TENSORS_NAME
    content, rng = path.read_bytes(), random.Random(1)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for position in [*range(8), *rng.sample(range(8, header), min(FLIPS, header - 8))]:
        damaged = bytearray(content)
        damaged[position] = rng.choice([0, 0x20, 0x22, 0x30, 0x39, 0x7F, 0xFF])
        path.write_bytes(damaged)
        refused_or_same(folder, original)


@pytest.mark.parametrize("kind", ["digit", "letter", "hex"])
def test_plausible_characters_in_the_json_are_refused(folder, kind):
    """The damage that stays valid JSON: a digit of a tau, a hash, a size, a name."""
    alphabet = {
        "digit": "0123456789",
        "letter": "abcdefghijklmnopqrstuvwxyz",
        "hex": "0123456789abcdef",
    }
    path, rng = folder / JSON_NAME, random.Random(2)
    text = path.read_text()
    places = [i for i, character in enumerate(text) if character in alphabet[kind]]
    for place in rng.sample(places, 100):
        other = rng.choice([c for c in alphabet[kind] if c != text[place]])
        damaged = text[:place] + other + text[place + 1 :]
        path.write_text(damaged)
        if _parsed(damaged) == json.loads(text):  # the 17th digit of a number may mean nothing
            assert text[place].isdigit()
        else:
            refused(folder)


def _parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
def test_truncated_files_are_refused(folder, name):
    content = (folder / name).read_bytes()
    for length in [0, 1, 7, 8, 9, len(content) // 2, len(content) - 1]:
        (folder / name).write_bytes(content[:length])
        refused(folder)


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 4096,
        b"\xff" * 4096,
        bytes(range(256)) * 16,
        b"\x80\x04\x95" + b"cos\nsystem\n",  # a pickle
        b"PK\x03\x04" + b"\0" * 60,  # a zip, which torch.load would open
        "{}".encode("utf-16"),
        b"\xef\xbb\xbf{}",
    ],
    ids=["zeros", "ones", "counting", "pickle", "zip", "utf-16", "byte order mark"],
)
def test_garbage_is_refused(folder, name, garbage):
    (folder / name).write_bytes(garbage)
    refused(folder)


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1, 100 << 20, 0])
def test_impossible_header_length_is_refused(folder, length):
    content = (folder / TENSORS_NAME).read_bytes()
    (folder / TENSORS_NAME).write_bytes(struct.pack("<Q", length) + content[8:])
    refused(folder, "safetensors")


@pytest.mark.parametrize("extra", [b"\0", b" ", b"junk" * 100])
def test_bytes_behind_the_tensors_are_refused(folder, extra):
    with (folder / TENSORS_NAME).open("ab") as file:
        file.write(extra)
    refused(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format": ' + "[" * 900 + "]" * 900 + "}",
        "9" * 5000,
        '{"format": ' + "9" * 5000 + "}",
        "[]",
        "null",
        "true",
        '"d2dmoe"',
        "1e999",
        '{"format": "d2dmoe"}',
        '{"format": "d2dmoe", "version": 1}',
        "{}",
        "{}{}",
        '{"format": "\\ud800"}',
    ],
    ids=lambda text: text[:20],
)
def test_other_json_is_refused(folder, text):
    (folder / JSON_NAME).write_text(text)
    refused(folder)


def test_too_large_json_is_not_even_read(folder):
    with (folder / JSON_NAME).open("r+b") as file:
        file.truncate(reading.MAX_JSON + 1)  # sparse: takes no space
    refused(folder, "bytes")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("key", ["tau", "loss", "share"])
def test_numbers_that_are_not_finite_are_refused(folder, key, number):
    path = folder / JSON_NAME
    value = {"tau": "0.1", "loss": "0.30000000000000004", "share": "0.125"}[key]
    text = path.read_text().replace(f'"{key}": {value}', f'"{key}": {number}')
    assert number in text
    path.write_text(text)
    refused(folder, "finite")


@pytest.mark.parametrize("key", ["format", "tau", "loss", "layer.0.router1", "sha256"])
def test_duplicate_keys_are_refused(folder, key):
    """Even one that repeats the same value: which of two values counts is a matter of the parser."""
    path = folder / JSON_NAME
    text = path.read_text()
    start = text.index(f'"{key}": ')
    stop = text.index(
        "\n", text.index("}", start) if text[start:].split(": ")[1][0] == "{" else start
    )
    entry = text[start:stop].rstrip(",")
    path.write_text(text[:start] + entry + ",\n" + text[start:])
    refused(folder, "duplicate")


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
def test_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    refused(folder, f"no file {name}")
    (folder / name).mkdir()
    refused(folder, f"no file {name}")


@pytest.mark.parametrize("name", ["absent", "a\0b", "x" * 5000, "saved/d2dmoe.json"])
def test_missing_folder_is_refused(folder, name):
    refused(folder.parent / name)


# Links.


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
def test_links_out_of_the_folder_are_refused(folder, tmp_path, name):
    target = shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(target)
    refused(folder, "leads out")
    (folder / name).unlink()
    (folder / name).symlink_to(Path("..") / "elsewhere")
    refused(folder, "leads out")


def test_link_loops_and_dangling_links_are_refused(folder):
    for target in (JSON_NAME, "absent"):
        (folder / JSON_NAME).unlink()
        (folder / JSON_NAME).symlink_to(target)
        refused(folder, "no file")


def test_links_inside_the_folder_and_to_the_folder_are_followed(folder, tmp_path):
    shutil.move(folder / JSON_NAME, folder / "real.json")
    (folder / JSON_NAME).symlink_to("real.json")
    (tmp_path / "link").symlink_to(folder)
    assert same(d2d.load(tmp_path / "link"), converted())


@pytest.mark.parametrize("inner", ["", "sub", "sub/sub"])
def test_hub_cache_is_followed(folder, tmp_path, inner):
    """The Hub's cache: snapshots/<revision>/**/file links to blobs/<hash>, beside snapshots."""
    repository = tmp_path / "models--someone--model"
    snapshot, blobs = repository / "snapshots" / ("0" * 40) / inner, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate((JSON_NAME, TENSORS_NAME)):
        shutil.move(folder / name, blobs / f"{i:064x}")
        up = "/".join([".."] * (2 + len(Path(inner).parts)))
        (snapshot / name).symlink_to(f"{up}/blobs/{i:064x}")
    assert same(d2d.load(snapshot), converted())
    other = tmp_path / "models--other--model" / "blobs"
    other.mkdir(parents=True)
    shutil.move(blobs / f"{0:064x}", other / "stolen")
    (snapshot / JSON_NAME).unlink()
    (snapshot / JSON_NAME).symlink_to(other / "stolen")
    refused(snapshot, "leads out")


# A hostile author: edits that know the format and carry a fresh digest.


def first(document):
    return document["sites"][0]


NEWER = ("interleaved", "d_out", "share_routers", "exclude")  # files of earlier versions lack them


def test_files_of_earlier_versions_are_read(folder):
    original = d2d.load(folder)

    def older(document):
        for item in document["sites"]:
            for key in NEWER[:2]:
                del item["site"][key]
        del document["config"]["share_routers"], document["config"]["exclude"]

    edit(folder, older)
    assert same(d2d.load(folder), original)


@pytest.mark.parametrize(
    "pick",
    [
        lambda d: d,
        lambda d: d["config"],
        lambda d: first(d),
        lambda d: first(d)["site"],
        lambda d: first(d)["plan"],
        lambda d: first(d)["hashes"],
        lambda d: first(d)["hashes"]["up"],
        lambda d: d["tensors"],
        lambda d: d["tensors"]["layer.0.router1"],
    ],
    ids=[
        "document",
        "config",
        "site entry",
        "site",
        "plan",
        "hashes",
        "hash",
        "manifest",
        "tensor",
    ],
)
def test_unknown_and_missing_keys_are_refused(folder, pick):
    content = (folder / JSON_NAME).read_text()
    keys = [key for key in pick(json.loads(content)) if key not in NEWER]
    for key in keys:
        (folder / JSON_NAME).write_text(content)

        def without(document, key=key):
            del pick(document)[key]

        edit(folder, without)
        refused(folder)
    (folder / JSON_NAME).write_text(content)
    edit(folder, lambda document: pick(document).update(surprise=1))
    refused(folder)


WRONG = [
    None,
    True,
    -1,
    0.5,
    1e9,
    10**400,
    "",
    "abc",
    [],
    [[]],
    [None],
    [1],
    {},
    {"a": []},
    {"a": 1},
]
ALLOWED = {
    "tau": [0.5],
    "role": [None],
    "share": [0.5],
    "share_routers": [True],
    "transposed": [[]],
    "halves": [[]],
    "stats": [{}, {"a": 1}],
    "dense": [{}],
    "permuted": [{}],  # no digest at all: refused when it is attached
    "shape": [[], [1]],
    "experts": [None],
}


def known(value, allowed):
    return any(type(value) is type(one) and value == one for one in allowed)


@pytest.mark.parametrize(
    ("pick", "keys"),
    [
        (lambda d: d, artifact.KEYS[:-1]),
        (lambda d: d["config"], tuple(d2d.Config.__dataclass_fields__)),
        (lambda d: first(d), ("site", "plan", "tau", "hashes", "stats")),
        (lambda d: first(d)["site"], tuple(Site.__dataclass_fields__)),
        (lambda d: first(d)["plan"], ("experts", "expert_size", "router_width")),
        (lambda d: first(d)["hashes"]["up"], ("shape", "dense", "permuted")),
        (lambda d: first(d)["hashes"]["up"]["dense"], ("float32", "bfloat16")),
        (lambda d: first(d)["hashes"], ("up", "p0.bias")),
    ],
    ids=["document", "config", "site entry", "site", "plan", "hash", "digest", "hashes"],
)
def test_values_of_a_wrong_type_or_size_are_refused(folder, pick, keys):
    """Every field with every wrong value; a few values are right for a few fields."""
    content = (folder / JSON_NAME).read_text()
    held = pick(json.loads(content))
    for key in keys:
        allowed = [*ALLOWED.get(key, []), held[key]]
        for value in WRONG:
            if known(value, allowed):
                continue
            (folder / JSON_NAME).write_text(content)
            edit(folder, lambda d, key=key, value=value: pick(d).update({key: value}))
            try:
                d2d.load(folder)
            except ArtifactError:
                continue
            pytest.fail(f"{key} = {value!r} loads")


@pytest.mark.parametrize(
    "tau", [-1, -1e-9, 1.0000001, 1e9, 10**400, "abc", "0.1", True, None, [0.1]]
)
def test_impossible_tau_is_refused(folder, tau):
    edit(folder, lambda document: first(document).update(tau=tau))
    refused(folder, "tau")


def test_edited_tau_is_refused_unless_sealed(folder):
    path = folder / JSON_NAME
    content = path.read_text()
    path.write_text(content.replace('"tau": 0.1', '"tau": 0.9'))
    refused(folder, "set_tau")
    path.write_text(content)
    edit(folder, lambda document: first(document).update(tau=0.9))
    assert d2d.load(folder).experts["layer.0"].tau == 0.9


@pytest.mark.parametrize("version", [0, 2, "1", 1.5, None, [1], -1])
def test_other_versions_are_refused_by_name(folder, version):
    edit(folder, lambda document: document.update(version=version))
    refused(folder, "version")


def test_newer_version_is_refused_as_such_whatever_its_keys(folder):
    edit(folder, lambda document: {"format": "d2dmoe", "version": 2, "new": {}})
    refused(folder, "version 2; expected 'd2dmoe' version 1")


def test_a_site_twice_is_refused(folder):
    edit(folder, lambda document: document["sites"].append(first(document)))
    refused(folder, "occurs twice")


def test_site_without_tensors_and_tensors_without_site_are_refused(folder):
    content = (folder / JSON_NAME).read_text()
    edit(folder, lambda document: first(document)["site"].update(name="layer.7"))
    refused(folder, r"lacks permutation, router1, router2 of site 'layer.7'")
    (folder / JSON_NAME).write_text(content)
    edit(folder, lambda document: document["sites"].pop(0) and None)
    refused(folder, "tensors of no site")


@pytest.mark.parametrize(
    "activation",
    [
        "__import__('os').system('true')",
        "up.__class__",
        "9**9**9**9 * up",
        "relu(" * 300 + "up" + ")" * 300,
        "up" * 5000,
        "\ud800",
        "relu(up)",  # the site has a scalar p0 that this does not read
        "relu(up) * p0 * gate",  # and no gate
        "relu(up) * p0 * q1",
        "relu(up, p0)",
        "gelu(p0 * up, approximate='fast')",
        "p0 * up + prelu(up, 0.5)",  # prelu takes tensors only
        "threshold(up * p0)",  # lacks its parameters
        "1.0",
        "p0",
        "",
    ],
    ids=lambda text: ascii(text[:24]),
)
def test_hostile_activation_is_refused(folder, activation):
    edit(folder, lambda document: first(document)["site"].update(activation=activation))
    refused(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "glu"),
        ("kind", "projection"),
        ("kind", "moe"),
        ("params", {"up": "a", "down": "b", "gate": "c"}),
        ("params", {"up": "a"}),
        ("biases", {"up": "a", "q0": "b"}),
        ("biases", {"up": "a", "p\u0663": "b"}),  # a digit to Python, though not ours
        ("transposed", ["gate"]),
        ("transposed", [{}]),
        ("halves", ["gate", "up"]),
        ("halves", ["x"]),
        ("role", "x"),
        ("share", 1.5),
        ("share", -0.5),
        ("share", True),
        ("d_hidden", 0),
        ("d_hidden", 12),
        ("d_model", 8),
        ("calls", 0),
    ],
)
def test_sites_that_make_no_sense_are_refused(folder, key, value):
    edit(folder, lambda document: first(document)["site"].update({key: value}))
    refused(folder)


@pytest.mark.parametrize("halves", [[], ["gate"], ["gate", "gate"], ["up", "gate", "up"], [1, 2]])
def test_halves_of_a_fused_site_are_checked(folder, halves):
    edit(folder, lambda document: document["sites"][2]["site"].update(halves=halves))
    refused(folder)


@pytest.mark.parametrize(
    "plan",
    [{"experts": 2}, {"expert_size": 3}, {"router_width": 6}, {"experts": 6, "expert_size": 1}],
)
def test_plans_that_do_not_fit_the_tensors_are_refused(folder, plan):
    edit(folder, lambda document: first(document)["plan"].update(plan))
    refused(folder)


@pytest.mark.parametrize("text", ["", "z" * 64, "A" * 64, "0" * 63, "0" * 64 + "\n", 0, None])
def test_digests_that_are_none_are_refused(folder, text):
    edit(folder, lambda document: first(document)["hashes"]["up"]["dense"].update(float32=text))
    refused(folder)


def test_swapped_tensors_are_refused(folder):
    path = folder / TENSORS_NAME
    tensors = load_file(path)
    for part in artifact.TENSORS:
        swapped = dict(tensors)
        one, other = f"layer.0.{part}", f"layer.1.{part}"
        swapped[one], swapped[other] = tensors[other], tensors[one]
        save_file(swapped, path)
        refused(folder, "manifest")


def test_missing_and_extra_tensors_are_refused(folder):
    path = folder / TENSORS_NAME
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != "layer.1.router2"}, path)
    refused(folder, "layer.1.router2")
    save_file({**tensors, "surprise": torch.zeros(1)}, path)
    refused(folder, "surprise")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("permutation", lambda t: t.clone().index_fill_(0, torch.tensor([1]), t[0].item())),
        ("permutation", lambda t: t - 1),
        ("permutation", lambda t: t + 1),
        ("permutation", lambda t: t.int()),
        ("permutation", lambda t: t.float()),
        ("permutation", lambda t: t[:-1]),
        ("permutation", lambda t: t[None]),
        ("router1", lambda t: t.double()),
        ("router1", lambda t: t.half()),
        ("router1", lambda t: t.to(torch.float8_e4m3fn)),
        ("router1", lambda t: t.to(torch.complex64)),
        ("router1", lambda t: t > 0),
        ("router1", lambda t: t.t()),
        ("router1", lambda t: t.reshape(-1)),
        ("router1", lambda t: t[:0]),
        ("router1", lambda t: t.sum()),
        ("router1", lambda t: t.clone().fill_(float("nan"))),
        ("router2", lambda t: t.clone().fill_(float("inf"))),
        ("router2", lambda t: torch.cat([t, t])),
    ],
)
def test_tensors_that_make_no_sense_are_refused(folder, part, change):
    name = f"layer.0.{part}"
    edit_tensors(folder, lambda ts: ts.update({name: change(ts[name]).contiguous()}))
    refused(folder, part)


def test_sealed_edits_load_when_they_make_sense(folder):
    """The edits above are refused for their content, and not because sealing them fails."""
    edit(
        folder,
        lambda document: first(document)["site"].update(share=0.5, activation="elu(p0 * up)"),
    )
    edit_tensors(folder, lambda ts: ts.update({"layer.0.router1": torch.ones(ROUTER, WIDTH)}))
    assert d2d.load(folder).experts["layer.0"].site.activation == "elu(p0 * up)"


# No code in data.


def test_nothing_unpickles_or_evaluates():
    """No call, import or attribute by which a file's bytes could become code."""
    package = Path(d2d.__file__).parent
    roots = [package, package.parent / "passes", package.parent / "kernels"]
    if not roots[1].is_dir():  # installed from a wheel
        roots = [package]
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    functions = {"eval", "exec", "compile", "__import__"}
    found, seen = [], 0
    for path in sorted(file for root in roots for file in root.rglob("*.py")):
        seen += 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            match node:
                case ast.Import(names=names):
                    bad = [name.name for name in names if name.name.split(".")[0] in modules]
                case ast.ImportFrom(module=str(module)):
                    bad = [module] if module.split(".")[0] in modules else []
                case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                    bad = ["torch.load"]
                case ast.Call(func=ast.Name(id=name)):
                    bad = [name] if name in functions else []
                case ast.keyword(arg="allow_pickle" | "weights_only" as name):
                    bad = [name]
                case _:
                    bad = []
            found += [f"{where} {name}" for name in bad]
    assert seen > 15
    assert not found
