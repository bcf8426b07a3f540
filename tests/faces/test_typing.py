"""What type checkers see: a user's program needs no `Any` where the kind is known."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
from typing import Any, assert_type

import numpy as np
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray

import linearize as lz
from linearize.operators import LinearOperator

here = lz.Linearizer(torch.sin).at(torch.zeros(3))
J = here.jacobian
v = torch.ones(3)
assert_type(J @ v, torch.Tensor)
assert_type(v @ J, torch.Tensor)
assert_type(J @ J.H, lz.operators.LinearOperator)
assert_type(J.gram(), lz.operators.LinearOperator)
assert_type(J.gram() + 0.1 * lz.operators.identity(J.in_space), lz.operators.LinearOperator)
assert_type(J.gram().damped(0.1)[:, :].as_real(), lz.operators.LinearOperator)
assert_type(J.adjoint(), lz.operators.LinearOperator)
assert_type(J.shape, tuple[int, int])
assert_type(J.materialize(), torch.Tensor)
assert_type(J.diagonal(), torch.Tensor)
assert_type(J.trace(samples=10), lz.operators.Estimate)
assert_type(J.trace(samples=10).error, torch.Tensor)
assert_type(here.vjp_fn(v), tuple[Any, ...])
assert_type(here.in_space.ravel(v), torch.Tensor)
assert_type(here.out_space.dot(v, v), torch.Tensor)
assert_type(lz.solvers.gmres(J, v), torch.Tensor)
assert_type(lz.operators.inverse(J) @ v, torch.Tensor)
net = torch.nn.Linear(2, 2)
G = lz.curvature.gauss_newton(net, "mse", [(torch.ones(1, 2), torch.ones(1, 2))])
assert_type(G, lz.curvature.Curvature)
assert_type(G.flat_gradient, torch.Tensor)
assert_type(lz.scipy.aslinearoperator(J), scipy.sparse.linalg.LinearOperator)
assert_type(J.to_scipy(), scipy.sparse.linalg.LinearOperator)
p = lz.scipy.VectorFunction(torch.sin, [1.0])
assert_type(p.x0, NDArray[Any])
assert_type(p.fun(p.x0), NDArray[Any])
assert_type(lz.scipy.ScalarFunction(torch.sum, [1.0]).fun(np.ones(1)), float)


def conjugate_gradients(A: LinearOperator, b: torch.Tensor, steps: int) -> torch.Tensor:
    x, r = torch.zeros_like(b), b
    p, size = r, r @ r
    for _ in range(steps):
        Ap = A @ p
        length = size / (p @ Ap)
        x, r = x + length * p, r - length * Ap
        size, before = r @ r, size
        p = r + size / before * p
    return x


def levenberg_marquardt(x: torch.Tensor) -> torch.Tensor:
    lin = lz.Linearizer(torch.sin, match="value")
    for _ in range(3):
        at = lin.at(x)
        (gradient,) = at.vjp_fn(at.value)
        J = at.jacobian
        x = x - conjugate_gradients(J.gram().damped(0.1 * J.gram().diagonal()), gradient, 5)
    return x


assert_type(levenberg_marquardt(v), torch.Tensor)
"""


@pytest.mark.slow
def test_a_program_passes_strict_checking(tmp_path):
    api = pytest.importorskip("mypy.api")
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    out, err, code = api.run(
        ["--strict", "--no-incremental", "--follow-imports=silent", str(path)]
    )
    assert code == 0, out + err


@pytest.mark.slow
def test_a_program_passes_pyright(tmp_path):
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("needs pyright")
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [pyright, "-p", str(tmp_path), "--pythonpath", sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
