"""The bridge to CuPy. What needs no GPU is tested through NumPy, which speaks DLPack too."""

import numpy as np
import pytest
import torch

import linearize as lz
import linearize.cupy
from linearize.cupy import Products
from tests.support.functions import rand

F64 = torch.float64


A = rand(4, 3)


def f(x):
    return A.to(x) @ x.sin()


def test_products_of_foreign_arrays():
    x = rand(3, seed=1)
    M = (A * x.cos()).numpy()
    products = Products(lz.Linearizer(f).at(x), np.from_dlpack)
    v, u, V, U = (rand(*s, seed=2).numpy() for s in ((3,), (4,), (3, 2), (4, 2)))
    for _ in range(4):
        np.testing.assert_allclose(products.forward(v), M @ v)
        np.testing.assert_allclose(products.back(u), M.T @ u)
        np.testing.assert_allclose(products.forward(V), M @ V)
        np.testing.assert_allclose(products.forward(np.asfortranarray(V)), M @ V)
        np.testing.assert_allclose(products.back(U), M.T @ U)
        np.testing.assert_allclose(products.forward(v[:, None]), M @ v[:, None])


def test_complex_products():
    z = rand(3, dtype=torch.complex128)
    products = Products(lz.Linearizer(lambda z: z.exp() * (1 + 2j)).at(z), np.from_dlpack)
    M = torch.diag(z.exp() * (1 + 2j)).numpy()
    v = rand(3, dtype=torch.complex128, seed=1).numpy()
    np.testing.assert_allclose(products.forward(v), M @ v)
    np.testing.assert_allclose(products.back(v), M.conj().T @ v)


def test_nothing_is_copied_on_the_way():
    seen = []

    def back(t):
        seen.append(t)
        return np.from_dlpack(t)

    J = lz.Linearizer(f).at(rand(3)).jacobian
    inner = J._apply

    def watched(parts, *, stacked):
        seen.append(parts[0])
        return inner(parts, stacked=stacked)

    J._apply = watched
    v = rand(3).numpy()
    result = Products(J, back).forward(v)
    given, returned = seen
    assert given.data_ptr() == v.__array_interface__["data"][0]
    assert returned.data_ptr() == result.__array_interface__["data"][0]


def test_what_does_not_fit():
    products = Products(lz.Linearizer(f).at(rand(3)), np.from_dlpack)
    with pytest.raises(lz.errors.SpaceError, match="float32"):
        products.forward(np.ones(3, dtype=np.float32))
    with pytest.raises(lz.errors.SpaceError, match=r"\(4,\)"):
        products.forward(np.ones(4))
    half = lz.Linearizer(torch.sin).at(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(lz.errors.UnsupportedError, match="bfloat16"):
        Products(half, np.from_dlpack)
    w = rand(3, dtype=torch.complex128)
    with pytest.raises(lz.errors.UnsupportedError, match="different dtypes"):
        Products(lz.Linearizer(lambda x: w * x).at(rand(3)), np.from_dlpack)
    with pytest.raises(lz.errors.StructureError, match="ndarray"):
        Products(np.eye(2), np.from_dlpack)


@pytest.mark.gpu
def test_conjugate_gradients_on_the_gpu():
    cupy = pytest.importorskip("cupy", reason="needs CuPy")
    from cupyx.scipy.sparse import linalg as solvers

    x = rand(3).cuda()
    here = lz.Linearizer(lambda x: torch.cat([f(x), x])).at(x)
    G = here.jacobian.gram()
    M = torch.autograd.functional.jacobian(lambda x: torch.cat([f(x), x]), x)
    b = cupy.asarray([1.0, 2.0, 3.0])
    got, info = solvers.cg(linearize.cupy.aslinearoperator(G), b, tol=1e-12)
    assert info == 0
    want = torch.linalg.solve(M.T @ M, torch.from_dlpack(b))
    torch.testing.assert_close(torch.from_dlpack(got), want, rtol=1e-7, atol=1e-9)
    B = linearize.cupy.aslinearoperator(here.jacobian)
    u = cupy.arange(7.0)
    torch.testing.assert_close(torch.from_dlpack(B.rmatvec(u)), M.T @ torch.from_dlpack(u))


def test_the_cpu_is_scipys_part():
    pytest.importorskip("cupy", reason="needs CuPy")
    with pytest.raises(lz.errors.SpaceError, match=r"linearize\.scipy"):
        linearize.cupy.aslinearoperator(lz.Linearizer(f).at(rand(3)))
