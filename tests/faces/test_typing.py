"""What type checkers see: a user's program needs no `Any` where the kind is known."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = ROOT / "tests/support/typed_program.py"


@pytest.mark.slow
def test_a_program_passes_strict_checking(tmp_path):
    api = pytest.importorskip("mypy.api")
    path = shutil.copy(PROGRAM, tmp_path)
    out, err, code = api.run(["--strict", "--no-incremental", "--follow-imports=silent", path])
    assert code == 0, out + err


@pytest.mark.slow
def test_a_program_passes_pyright(tmp_path):
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("needs pyright")
    shutil.copy(PROGRAM, tmp_path)
    settings = {
        "typeCheckingMode": "strict",
        "reportMissingTypeStubs": False,  # SciPy has none of its own
        "extraPaths": [str(ROOT)],
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [pyright, "-p", str(tmp_path), "--pythonpath", sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_runs():
    runpy.run_path(str(PROGRAM))
