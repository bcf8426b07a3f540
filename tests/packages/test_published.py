"""Functions of packages: right in both directions, right with a matrix, or refused by name."""

from __future__ import annotations

import pytest

from tests.packages.outcomes import BOTH, MATRIX, ONE, REFUSED, outcome
from tests.packages.published import CASES

#: The others are right in both directions.
EXPECTED = {
    "xitorch: integrate.solve_ivp": MATRIX,
    "linear_operator: sqrt_inv_matmul": MATRIX,
    # Its backward can be called once.
    "torch_geometric: GroupAddRev": REFUSED,
    # Solvers that break down for unit vectors, or are not linear.
    "torchsparsegradutils: sparse_generic_solve": ONE,
    "torchsparsegradutils: sparse_generic_lstsq": MATRIX,
    "torchsparsegradutils: sparse_triangular_solve": MATRIX,
    "osqp: OSQP layer": ONE,
    "cvxpylayers: CvxpyLayer": MATRIX,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_published(name: str) -> None:
    package = name.partition(":")[0]
    pytest.importorskip(
        package, reason=f"{package} is not installed (extra `packages`)", exc_type=ImportError
    )
    found = outcome(CASES[name])
    assert found.kind == EXPECTED.get(name, BOTH), found
