"""The examples run as a reader would run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.minilm
def test_the_readme_example_runs_as_it_stands(tmp_path: Path) -> None:
    """The code, not its defaults: routers are fitted for two epochs instead of thirty."""
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "D2D_ROUTER_EPOCHS": "2",
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "6 blocks hold" in done.stdout and "of the dense multiply-adds" in done.stdout
    assert (tmp_path / "experts" / "d2dmoe.safetensors").is_file()


@pytest.mark.minilm
def test_quickstart_in_its_quick_form(tmp_path: Path) -> None:
    """A few texts: the table, an equal reload in a fresh process, the plot and the saved experts."""
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "quickstart.py"),
            "--quick",
            "--out",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "reloaded in a fresh process: outputs differ by 0.0e+00" in done.stdout
    rows = json.loads((tmp_path / "results.json").read_text())["clustered"]
    assert rows[0]["executed"] == 1.0 and rows[1]["executed"] < 0.9
    assert rows[0]["difference"] < 1e-4
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "conversion").iterdir()) == [
        "d2dmoe.json",
        "d2dmoe.safetensors",
    ]


def test_write_a_pass(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "write_a_pass.py")],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "before: []" in done.stdout and "after:  ['0', '1']" in done.stdout
    assert "converted 2 blocks; tau = 0 differs by" in done.stdout
