"""What a type checker sees: a user's program needs no `Any` where the kind is known."""

import textwrap

import pytest

PROGRAM = """
from typing import Any, assert_type

import torch

import linearize as lz

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
assert_type(lz.scipy.ScalarFunction(torch.sum, [1.0]).fun([1.0]), float)  # type: ignore[arg-type]
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
