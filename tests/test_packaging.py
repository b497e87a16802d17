"""What installs: wheel contents, entry point, inert folders, and light imports."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import d2dcompile as d2d

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(code: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_listed_packages_are_the_folders() -> None:
    found = {"d2dcompile"}
    for top in ("passes", "kernels"):
        for path in (ROOT / top).rglob("__init__.py"):
            found.add(".".join(("d2dcompile", *path.parent.relative_to(ROOT).parts)))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_types() -> None:
    """As `make check` does, of a copy: mypy wants packages in the folders that they are imported from."""
    shutil.rmtree(ROOT / "build/typing", ignore_errors=True)
    setup = ["-c", "from setuptools import setup; setup()", "-q", "build_py"]
    for command in ([*setup, "--build-lib", "build/typing"], ["-m", "mypy"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_distributions_hold_the_package_and_nothing_else(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = ["d2dcompile", "passes", "kernels", "pyproject.toml", "README.md", "LICENSE"]
    source.mkdir()
    for name in tracked:
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    if kind == "wheel":
        command.append("--wheel")  # without it: sdist, and the wheel built from that sdist
    subprocess.run([*command, str(source)], check=True, capture_output=True, timeout=300)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"d2dcompile"}
    data = ("py.typed", "kernels/cpu/vec.h", "kernels/gpu/math.py")
    for inside in (*data, "passes/match_ffn.py", "kernels/gate/__init__.py"):
        assert f"d2dcompile/{inside}" in names
    target = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(target),
            str(wheel),
        ],
        check=True,
        timeout=300,
    )
    code = "import d2dcompile.passes, d2dcompile.kernels.gate as g; print(g.__file__)"
    assert str(target) in run(code, tmp_path, PYTHONPATH=str(target))


def test_entry_point_lists_the_backend_without_importing_it() -> None:
    code = (
        "import sys, torch; print('d2dmoe' in torch._dynamo.list_backends(), "
        "'d2dcompile' in sys.modules)"
    )
    assert run(code, ROOT / "tests") == "True False"
    assert "d2dmoe" in torch._dynamo.list_backends()


def test_import_is_free_of_heavy_packages() -> None:
    # torch imports triton itself where it is installed.
    heavy = "transformers matplotlib sklearn k_means_constrained sentence_transformers"
    code = f"import sys, d2dcompile; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert run(code, ROOT / "tests") == "[]"


def test_transformers_imports_with_our_kernels_folder_in_its_way() -> None:
    """From the repository's root, `kernels` is our folder and not Hugging Face's package."""
    code = "import kernels, transformers.integrations.hub_kernels; print(kernels.__file__)"
    assert run(code, ROOT, PYTHONPATH=str(ROOT)) == str(ROOT / "kernels" / "__init__.py")


def test_version_and_public_names() -> None:
    assert d2d.__version__ == PROJECT["project"]["version"]
    for name in d2d.__all__:
        assert getattr(d2d, name).__doc__, f"{name} has no docstring"


def test_every_error_says_what_it_is_for() -> None:
    for name, error in vars(d2d.errors).items():
        if isinstance(error, type):
            assert error.__doc__, name
            assert issubclass(error, (d2d.errors.D2DError, d2d.errors.D2DWarning)), name


def test_nothing_names_the_machine_it_was_written_on() -> None:
    # Spelt in parts, so that this file does not hold what it looks for.
    words = ["/wo" + "rk/", "/roo" + "t/", "bash_" + "jobs"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        text = (ROOT / name).read_bytes().decode("utf-8", "ignore")
        assert not [word for word in words if word in text], name
