"""Operators against dense matrices from other sources: PyTorch's autograd, or by hand."""

import contextlib
import gc
import weakref

import pytest
import torch

import linearize as lz
from linearize.operators import LinearOperator, from_diagonal, identity
from tests.support.functions import rand
from tests.support.operator_contract import check_operator

torch_jacobian = torch.autograd.functional.jacobian


class Opaque(torch.autograd.Function):
    """sin by NumPy: PyTorch sees nothing of it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return torch.from_numpy(__import__("numpy").sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * __import__("numpy").cos(x.detach().numpy()))

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(t.detach().numpy() * __import__("numpy").cos(x.detach().numpy()))


def vector(x):
    """5 numbers to 3, nowhere square."""
    return torch.stack([x[0] * x[1].exp(), (x * x).sum(), x[2].sin() * x[4]])


def wide(x):
    """A matrix to a cube."""
    return (x.sin()[:, None, :] * x[None, :, :1].cos()).cumsum(0)


def several(p, s):
    """Pytrees on both sides."""
    h = torch.tanh(p["w"] @ s + p["b"])
    return h, {"norm": (h * h).sum(), "s": s.exp()[:2]}


def holomorphic(z):
    """Complex-linear derivative."""
    return torch.stack([z[0] * z[1], z[1].exp(), (z * z).sum(), z[2] * (1 + 2j)])


def vector_case():
    x = rand(5)
    return lz.Linearizer(vector).at(x).jacobian, torch_jacobian(vector, x)


def wide_case():
    x = rand(2, 3)
    return lz.Linearizer(wide).at(x).jacobian, torch_jacobian(wide, x).reshape(12, 6)


def opaque_case():
    x = rand(4)
    A = rand(3, 4, seed=1)
    here = lz.Linearizer(lambda x: A @ Opaque.apply(x)).at(x)
    return here.jacobian, A * x.cos()


def several_case():
    p, s = {"w": rand(3, 4), "b": rand(3, seed=1)}, rand(4, seed=2)
    A = lz.Linearizer(several).at(p, s).jacobian

    def flat(w, b, s):  # dictionaries in the order of insertion
        h, d = several({"w": w, "b": b}, s)
        return torch.cat([h, d["norm"].reshape(1), d["s"]])

    blocks = torch_jacobian(flat, (p["w"], p["b"], s))
    return A, torch.cat([b.reshape(6, -1) for b in blocks], dim=1)


def complex_case():
    z = rand(3, dtype=torch.complex128)
    # Independent of autograd: derivatives by hand.
    o = torch.zeros((), dtype=torch.complex128)
    matrix = torch.stack(
        [
            torch.stack([z[1], z[0], o]),
            torch.stack([o, z[1].exp(), o]),
            2 * z,
            torch.stack([o, o, o + 1 + 2j]),
        ]
    )
    return lz.Linearizer(holomorphic).at(z).jacobian, matrix


def scaled_case():
    A, M = vector_case()
    return -3 * A * torch.tensor(0.5), -1.5 * M


def complex_scaled_case():
    A, M = complex_case()
    return (1 + 2j) * A, (1 + 2j) * M


def sum_case():
    A, M = vector_case()
    x = rand(5, seed=3)
    B = lz.Linearizer(vector).at(x).jacobian
    return A - B, M - torch_jacobian(vector, x)


def composed_case():
    A, M = wide_case()
    x = rand(6, seed=4)
    inner = lz.Linearizer(lambda x: (x * x[0]).view(2, 3)).at(x).jacobian
    return A @ inner, M @ torch_jacobian(lambda x: x * x[0], x)


def gram_case():
    A, M = several_case()
    return A.gram(), M.T @ M


def damped_case():
    A, M = several_case()
    d = rand(M.shape[1], seed=5)
    return (
        A.gram() + 0.5 * identity(A.in_space) + from_diagonal(A.in_space, d),
        M.T @ M + 0.5 * torch.eye(M.shape[1], dtype=M.dtype) + torch.diag(d),
    )


def complex_diagonal_case():
    A, _ = complex_case()
    d = rand(3, dtype=torch.complex128, seed=6)
    return from_diagonal(A.in_space, d), torch.diag(d)


def function_case():
    A, M = vector_case()

    def apply(parts, *, stacked):
        return [parts[0] @ M.T]

    def apply_adjoint(parts, *, stacked):
        return [parts[0] @ M]

    return LinearOperator(A.in_space, A.out_space, apply, apply_adjoint), M


CASES = [
    vector_case,
    wide_case,
    opaque_case,
    several_case,
    complex_case,
    scaled_case,
    complex_scaled_case,
    sum_case,
    composed_case,
    gram_case,
    damped_case,
    complex_diagonal_case,
    function_case,
]


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__.removesuffix("_case"))
def test_every_operator_meets_the_contract(case):
    check_operator(*case())


def test_products_do_not_run_f():
    runs = 0

    def f(x):
        nonlocal runs
        runs += 1
        return vector(x)

    J = lz.Linearizer(f).at(rand(5)).jacobian
    J.materialize(), J.gram().materialize(), J @ rand(5, 3), J.T @ rand(3)
    assert runs == 1


def test_structured_forms():
    x = rand(2, 3)
    J = lz.Linearizer(wide).at(x).jacobian
    v = rand(2, 3, seed=1)
    want = torch.func.jvp(wide, (x,), (v,))[1]
    torch.testing.assert_close(J(v), want)
    torch.testing.assert_close(J @ v, want)  # not flat: an element
    torch.testing.assert_close(J @ v.reshape(-1), want.reshape(-1))
    p, s = {"w": rand(3, 4), "b": rand(3, seed=1)}, rand(4, seed=2)
    J = lz.Linearizer(several).at(p, s).jacobian
    tangents = ({"w": rand(3, 4, seed=7), "b": rand(3, seed=8)}, rand(4, seed=9))
    want = torch.func.jvp(several, (p, s), tangents)[1]
    for got in (J(tangents), J @ tangents):
        torch.testing.assert_close(got, want)
    zero = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(J((tangents[0], None)), J((tangents[0], zero)))


def test_gram_is_one_program():
    def chain(x):
        for _ in range(50):
            x = torch.sin(x) * 1.1 - 0.028
        return x

    x = rand(7)
    d = torch_jacobian(chain, x).diagonal()
    G = lz.Linearizer(chain).at(x).jacobian.gram()
    for _ in range(4):
        v = rand(7, seed=1)
        torch.testing.assert_close(G @ v, d * d * v)
    assert len(G._product.program.equations) == 1


@pytest.mark.parametrize("used_before", [False, True])
def test_gram_at_many_points(used_before):
    lin = lz.Linearizer(vector, maxsize=0)
    for seed in range(6):
        x = rand(5, seed=seed)
        J = lin.at(x).jacobian
        if used_before:
            J.materialize(), J.H.materialize()
        M = torch_jacobian(vector, x)
        G = J.gram()
        for _ in range(4):
            torch.testing.assert_close(G.materialize(), M.T @ M)
            torch.testing.assert_close(J.gram() @ x, M.T @ (M @ x))
        x.mul_(2)  # a residual, or not: right or an error
        with contextlib.suppress(lz.errors.StalenessError):
            torch.testing.assert_close(G @ M[0], M.T @ (M @ M[0]))


def test_gram_where_an_output_is_constant():
    G = lz.Linearizer(lambda x: (x * x, torch.ones(2))).at(rand(3)).jacobian.gram()
    x = rand(3)
    for _ in range(4):
        torch.testing.assert_close(G.materialize(), torch.diag(4 * x * x))


def test_automatic_direction_takes_the_fewer_products():
    calls = {"forward": 0, "reverse": 0}
    A, M = vector_case()

    def counting(name, matrix):
        def apply(parts, *, stacked):
            calls[name] += len(parts[0]) if stacked else 1
            return [parts[0] @ matrix]

        return apply

    B = LinearOperator(A.in_space, A.out_space, counting("forward", M.T), counting("reverse", M))
    torch.testing.assert_close(B.materialize(), M)
    assert calls == {"forward": 0, "reverse": 3}
    torch.testing.assert_close(B.H.materialize(), M.T)
    assert calls == {"forward": 0, "reverse": 6}


def test_chunk_size_bounds_what_is_mapped_at_once():
    sizes = []
    A, M = vector_case()

    def apply(parts, *, stacked):
        sizes.append(len(parts[0]) if stacked else 1)
        return [parts[0] @ M.T]

    B = LinearOperator(A.in_space, A.out_space, apply, apply, at_once=lambda adjoint: 0)
    torch.testing.assert_close(B.materialize(chunk_size=2, direction="forward"), M)
    assert sizes == [2, 2, 1]
    sizes.clear()
    torch.testing.assert_close(B.materialize(chunk_size="auto", direction="forward"), M)
    assert sizes == [1] * 5


def test_single_and_double_precision_leaves_share_a_vector():
    x, y = rand(2), rand(3).float()
    J = lz.Linearizer(lambda x, y: (x.sum() * y.double()).sin()).at(x, y).jacobian
    assert J.dtype == torch.float64
    blocks = torch_jacobian(lambda x, y: (x.sum() * y.double()).sin(), (x, y))
    want = torch.cat([b.double() for b in blocks], dim=1)
    torch.testing.assert_close(J.materialize(), want, rtol=1e-6, atol=1e-6)


def test_maps_that_have_no_complex_matrix_are_refused():
    z = rand(3, dtype=torch.complex128)
    J = lz.Linearizer(lambda z: z * z.conj()).at(z).jacobian
    v = rand(3, dtype=torch.complex128, seed=1)
    torch.testing.assert_close(J @ v, z * v.conj() + z.conj() * v)
    with pytest.raises(lz.errors.UnsupportedError, match="holomorphic"):
        J.materialize()
    with pytest.raises(lz.errors.UnsupportedError, match="holomorphic"):
        linearize_scipy(J)
    # Real to complex: columns are right, the adjoint is real.
    w = torch.complex(rand(3), rand(3, seed=2))
    J = lz.Linearizer(lambda x: w * x).at(rand(3)).jacobian
    torch.testing.assert_close(J.materialize(), torch.diag(w))
    torch.testing.assert_close(J.gram().materialize(), torch.diag(w.abs() ** 2))
    with pytest.raises(lz.errors.UnsupportedError):
        J.materialize(direction="reverse")
    with pytest.raises(lz.errors.UnsupportedError):
        J.H.materialize()
    with pytest.raises(lz.errors.UnsupportedError):
        linearize_scipy(J)
    both = lz.Linearizer(lambda x, z: x * z).at(rand(3), z).jacobian
    with pytest.raises(lz.errors.UnsupportedError, match="both real and complex"):
        both @ rand(6, dtype=torch.complex128)


def linearize_scipy(A):
    import linearize.scipy

    return linearize.scipy.aslinearoperator(A)


def test_what_does_not_fit_is_named():
    A, _ = vector_case()
    with pytest.raises(lz.errors.SpaceError, match=r"\(5,\).*got \(4,\)"):
        A @ rand(4)
    with pytest.raises(lz.errors.SpaceError, match="float32"):
        A @ rand(5).float()
    with pytest.raises(lz.errors.StructureError, match="from_numpy"):
        A @ rand(5).numpy()
    with pytest.raises(lz.errors.StructureError):
        A @ {"x": rand(5)}
    with pytest.raises(lz.errors.SpaceError):
        A @ A
    with pytest.raises(lz.errors.SpaceError):
        A + A.H
    with pytest.raises(lz.errors.SpaceError, match="complex factor"):
        1j * A
    with pytest.raises(lz.errors.OptionError):
        A.materialize(direction="sideways")
    for wrong in (0, -1, "many", 1.5):
        with pytest.raises(lz.errors.OptionError):
            A.materialize(chunk_size=wrong)
    with pytest.raises(TypeError):
        A + 1
    with pytest.raises(lz.errors.SpaceError):
        from_diagonal(A.in_space, rand(4))


def test_products_are_differentiable_in_the_vector():
    A, M = vector_case()
    v = rand(5, seed=1).requires_grad_()
    u = rand(3, seed=2)
    for _ in range(4):
        torch.testing.assert_close(torch.autograd.grad(A @ v, v, u)[0], M.T @ u)
        (g,) = torch.autograd.grad((A.gram() @ v) @ rand(5, seed=3), v)
        torch.testing.assert_close(g, M.T @ (M @ rand(5, seed=3)))


def test_the_jacobian_outlives_the_point_and_holds_no_more():
    lin = lz.Linearizer(vector, maxsize=0)
    here = lin.at(rand(5))
    gone, J = weakref.ref(here), here.jacobian
    del here
    gc.collect()
    assert gone() is None
    torch.testing.assert_close(J.materialize(), torch_jacobian(vector, rand(5)))
    product = weakref.ref(J._products[0])
    del J
    gc.collect()
    assert product() is None
    with lin:
        here = lin.at(rand(5))
        J = here.jacobian
        J @ rand(5)
        G = J.gram()
    with pytest.raises(lz.errors.ClosedError):
        _ = here.jacobian
    with pytest.raises(lz.errors.ClosedError):
        J @ rand(5)
    with pytest.raises(lz.errors.ClosedError):
        G @ rand(5)


def test_empty_sides():
    J = lz.Linearizer(lambda x: x[:0]).at(rand(3)).jacobian
    assert J.shape == (0, 3)
    assert J.materialize().shape == (0, 3)
    assert (J @ rand(3)).shape == (0,)
    assert torch.equal(J.gram().materialize(), torch.zeros(3, 3, dtype=torch.float64))
