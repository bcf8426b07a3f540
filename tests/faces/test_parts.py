"""Vectors of which each rank has a part: inner products, solvers, and who refuses them."""

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dnn

import linearize as lz
import linearize.distributed as lzd
import linearize.scipy
from linearize.curvature import gauss_newton
from linearize.errors import DistributedError, SpaceError, UnsupportedError
from tests.support.ranks import F64, rand, together

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

SIZES = 3, 5, 2, 4


def mine(rank):
    return slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))


def whole_function(x):
    """Give as many numbers as x has, with a Jacobian that is not symmetric."""
    return x + 0.1 * x.roll(1) * x + 0.3 * torch.sin(x) * x.square().sum() / len(x)


def part_function(rank, world):
    """Return the same for the part of a rank: neighbours and the sum come from the others."""

    def f(part):
        ends = [empty(1) for _ in range(world)]
        given = [part[-1:] * (r == (rank + 1) % world) for r in range(world)]
        before = torch.stack(dnn.all_to_all(ends, given)).sum(0)
        total = dnn.all_reduce(part.square().sum())
        rolled = torch.cat([before, part[:-1]])
        n = sum(SIZES[:world])
        return part + 0.1 * rolled * part + 0.3 * torch.sin(part) * total / n

    return f


def empty(n):
    return torch.empty(n, dtype=F64)


def solvers(rank, world):
    """Solve with SciPy on parts: the solution and the steps of one process."""
    n = sum(SIZES[:world])
    x, b, v = rand(n, seed=1), rand(n, seed=2), rand(n, seed=3)
    J = torch.autograd.functional.jacobian(whole_function, x)
    here = lz.Linearizer(part_function(rank, world)).at(x[mine(rank)])
    own = mine(rank)
    torch.testing.assert_close(here.value, whole_function(x)[own])
    torch.testing.assert_close(lzd.dot(here.in_space, v[own], b[own]), v @ b)
    torch.testing.assert_close(lzd.norm(here.out_space, v[own]), v.norm())
    A = linearize.scipy.aslinearoperator(here.jacobian)
    assert A.shape == (n, n)
    np.testing.assert_allclose(A @ v.numpy(), (J @ v).numpy())
    np.testing.assert_allclose(A.T @ v.numpy(), (J.T @ v).numpy())
    np.testing.assert_allclose(A @ np.eye(n), J.numpy(), atol=1e-12)
    torch.testing.assert_close(lzd.gathered(here.jacobian).materialize(), J)
    gram = here.jacobian.gram() + 0.1 * lz.operators.identity(here.jacobian.in_space)
    S = linearize.scipy.aslinearoperator(gram)
    M = (J.T @ J + 0.1 * torch.eye(n, dtype=F64)).numpy()
    for solve in (sla.cg, sla.minres):
        got, want = solve(S, b.numpy(), rtol=1e-11), solve(M, b.numpy(), rtol=1e-11)
        assert got[1] == want[1] == 0
        np.testing.assert_allclose(got[0], want[0], rtol=1e-7)
    got, info = sla.gmres(A, b.numpy(), rtol=1e-11, restart=n)
    assert info == 0
    np.testing.assert_allclose(got, np.linalg.solve(J.numpy(), b.numpy()), rtol=1e-7)
    got, want = (sla.lsmr(o, b.numpy(), atol=1e-12, btol=1e-12) for o in (A, J.numpy()))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert got[2] == want[2]  # as many steps: the norms are those of whole vectors
    everywhere = [None] * world
    dist.all_gather_object(everywhere, got[0].tolist())
    assert all(other == everywhere[0] for other in everywhere)  # to the last digit
    # Conjugate gradients in PyTorch, on parts.
    y = conjugate_gradients(gram, here.in_space, b[own], 40)
    np.testing.assert_allclose(y.numpy(), np.linalg.solve(M, b.numpy())[own], rtol=1e-8)


def conjugate_gradients(A, space, b, steps):
    y, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), lzd.dot(space, r, r)
    for _ in range(steps):
        if rr.sqrt() < 1e-13:
            break
        Ap = A @ p
        step = rr / lzd.dot(space, p, Ap)
        y, r = y + step * p, r - step * Ap
        before, rr = rr, lzd.dot(space, r, r)
        p = r + rr / before * p
    return y


def rows(rank, world):
    """Rows over ranks: LSMR takes the norms of all rows."""
    n = sum(SIZES[:world])
    M, b = rand(n, 2, seed=4), rand(n, seed=5)
    J = lzd.jacobian(lambda p: M[mine(rank)] @ p, rand(2))
    A = linearize.scipy.aslinearoperator(J)
    assert A.shape == (n, 2)
    got, want = (sla.lsmr(o, b.numpy(), atol=1e-12, btol=1e-12) for o in (A, M.numpy()))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-8)
    assert got[2] == want[2]
    weight = torch.ones(SIZES[rank], dtype=F64)
    J = lzd.jacobian(lambda p: M[mine(rank)] @ p * weight, rand(2))
    A = linearize.scipy.aslinearoperator(J)
    A @ np.ones(2)
    if rank == 0:
        weight.mul_(2)
    with pytest.raises(DistributedError, match="rank 0: StalenessError"):
        A @ np.ones(2)


def refused(rank, world):
    """What does not know of ranks says so, on all of them."""
    f, x = part_function(rank, world), rand(sum(SIZES[:world]))[mine(rank)]
    here = lz.Linearizer(f).at(x)
    J = here.jacobian
    whole = lz.Linearizer(torch.sin).at(x).jacobian
    with pytest.raises(SpaceError, match="each rank has a part"):
        J + whole
    with pytest.raises(SpaceError, match="each rank has a part"):
        whole @ J
    for call in (
        J.materialize,
        lambda: list(J.rows()),
        lambda: lz.sparse.jacobian(here),
        lambda: lz.func.jvp(f, (x,), (x,)),
        lambda: lz.func.jacrev(f)(x),
        lambda: linearize.scipy.newton_krylov(f, x),
        lambda: gauss_newton(lambda p, _: f(p), x, "mse", [(x, x)]) @ x,
    ):
        with pytest.raises(UnsupportedError, match=r"communicates|each rank has a part"):
            call()
    lz.testing.check_linearization(f, x)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("scene", [solvers, rows, refused], ids=lambda s: s.__name__)
def test_ranks(scene, world, tmp_path):
    together(world, tmp_path, scene)
