"""Operators spread over processes (gloo), against the same on one process."""

import os
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.sparse.linalg import cg

import linearize as lz
import linearize.distributed as lzd
import linearize.scipy
from linearize.curvature import gauss_newton
from tests.support.ranks import F64, expect, rand, together

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


ROWS, N = 13, 5


def shares(world):
    """Cut the data unevenly, so that no two ranks have as much."""
    A, y = rand(ROWS, N), rand(ROWS, seed=1)
    sizes = [1 + r for r in range(world - 1)]
    sizes.append(ROWS - sum(sizes))
    return list(zip(A.split(sizes), y.split(sizes), strict=True))


def model(p, A):
    return torch.tanh(A @ p["x"]) * p["s"]


def params():
    return {"x": rand(N, seed=2), "s": torch.tensor(1.3, dtype=F64)}


def dense():
    A, y = rand(ROWS, N), rand(ROWS, seed=1)
    t = torch.cat([params()["x"], params()["s"][None]])
    f = lambda t: model({"x": t[:N], "s": t[N]}, A) - y  # noqa: E731
    return torch.autograd.functional.jacobian(f, t), f(t)


def agree(rank, world):
    """Compare every form with the dense Jacobian of all rows."""
    A, y = shares(world)[rank]
    M, r = dense()
    mine = slice(sum(len(a) for a, _ in shares(world)[:rank]), None)
    J = lzd.jacobian(lambda p: model(p, A) - y, params())
    own = M[mine][: len(A)]
    v, u = rand(N + 1, seed=3), rand(ROWS, seed=4)
    for _ in range(4):
        torch.testing.assert_close(J @ v, own @ v)
        torch.testing.assert_close(J.T @ u[mine][: len(A)], M.T @ u)
        torch.testing.assert_close(J.gram() @ v, M.T @ (M @ v))
    X = rand(N + 1, 3, seed=5)
    torch.testing.assert_close(J.gram() @ X, M.T @ (M @ X))
    torch.testing.assert_close(J.materialize(), own)
    torch.testing.assert_close(J.gram().materialize(chunk_size=2), M.T @ M)
    # Conjugate gradients, unchanged.
    G = linearize.scipy.aslinearoperator(J.gram() + 0.1 * lz.operators.identity(J.in_space))
    b = (J.T @ J.here.value).numpy()
    x, info = cg(G, b, rtol=1e-12)
    assert info == 0
    want = np.linalg.solve((M.T @ M).numpy() + 0.1 * np.eye(N + 1), (M.T @ r).numpy())
    np.testing.assert_allclose(x, want, rtol=1e-8)
    # Curvature: each rank has its own batches.
    C = lzd.total(
        lambda: gauss_newton(model, params(), lambda o, t: ((o - t) ** 2).sum(), [(A, y)])
    )
    for _ in range(4):
        torch.testing.assert_close(C @ v, 2 * M.T @ (M @ v))


def fail(rank, world):
    """Let one rank fail at each stage: all of them get the error, and can go on."""
    A, _ = shares(world)[rank]
    bad = world - 1

    def f(p):
        if rank == bad:
            raise ValueError("no data")
        return model(p, A)

    expect(f"rank {bad}: ValueError: no data", lambda: lzd.jacobian(f, params()))
    expect("differ", lambda: lzd.jacobian(lambda p: p, torch.ones(2 + (rank == bad))))
    expect("self-adjoint", lambda: lzd.total(lambda: lz.Linearizer(torch.sin).at(A).jacobian))
    weight = torch.ones(len(A), dtype=F64)
    J = lzd.jacobian(lambda p: model(p, A) * weight, params())
    G, v = J.gram(), rand(N + 1, seed=3)
    good = G @ v
    if rank == bad:
        weight.mul_(2)  # a residual changes in place
    expect(f"rank {bad}: StalenessError", lambda: G @ v)
    expect(f"rank {bad}: StalenessError", lambda: J.T @ weight)
    J = lzd.jacobian(lambda p: model(p, A), params())
    torch.testing.assert_close(J.gram() @ v, good)
    expect("different numbers", lambda: J.gram() @ rand(N + 1, 2 + (rank == bad)))


def die(rank, world):
    """Let one rank end: the others must not wait for it."""
    A, _ = shares(world)[rank]
    J = lzd.jacobian(lambda p: model(p, A), params())
    if rank == world - 1:
        os._exit(0)
    start = time.monotonic()
    expect("cannot be reached", lambda: [J.gram() @ rand(N + 1) for _ in range(3)])
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("scene", [agree, fail, die], ids=lambda s: s.__name__)
def test_ranks(scene, world, tmp_path):
    together(world, tmp_path, scene, timeout=20)
