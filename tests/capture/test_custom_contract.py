"""Custom Functions that break the contract, or treat memory as their own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.autograd import Function
from torch.utils import _pytree as pytree

import linearize as lz
from linearize.errors import (
    FunctionContractError,
    LinearizeError,
    MissingDerivativeError,
    StalenessError,
)
from tests.support.functions import F64, direction, opaque, point
from tests.support.references import finite_difference, native_jvp

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

close = torch.testing.assert_close


# -- what a jvp may return -------------------------------------------------------------------


class Doubling(Function):
    """2 x; what its jvp and backward return is replaced by the tests."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


WRONG_TANGENTS = {
    "None": (lambda t: None, "None"),
    "tuple of None": (lambda t: (None,), "None"),
    "too many": (lambda t: (2 * t, t), "2 tangents, expected 1"),
    "none at all": (lambda t: (), "0 tangents, expected 1"),
    "wrong shape": (lambda t: 2 * t[:2], r"float64\[2\].*expected float64\[6\]"),
    "one that would broadcast": (lambda t: t.sum(), r"float64\[\].*expected float64\[6\]"),
    "float32": (lambda t: (2 * t).float(), r"float32\[6\].*expected float64\[6\]"),
    "integers": (lambda t: (2 * t).long(), r"int64\[6\].*expected float64\[6\]"),
    "complex": (lambda t: 2 * t + 0j, r"complex128\[6\].*expected float64\[6\]"),
    "a number": (lambda t: 2.0, "float"),
    "an array": (lambda t: t.numpy(), "ndarray"),
    "nested": (lambda t: ((2 * t,),), "tuple"),
    "another device": (lambda t: t.to("meta"), "meta"),
    "sparse": (lambda t: (2 * t).to_sparse(), "sparse"),
}


@pytest.mark.parametrize("kind", WRONG_TANGENTS)
def test_wrong_tangent(kind):
    result, message = WRONG_TANGENTS[kind]
    Wrong = type("Wrong", (Doubling,), {"jvp": staticmethod(lambda ctx, t: result(t))})
    here = lz.Linearizer(lambda x: Wrong.apply(x) + x).at(point())
    v = direction(point())
    for _ in range(2):
        with pytest.raises(FunctionContractError, match=rf"Wrong\.jvp.*{message}"):
            here.jvp_fn(v)
        close(here.vjp_fn(v)[0], 3 * v)


@pytest.mark.parametrize("kind", [k for k in WRONG_TANGENTS if "None" not in k])
@pytest.mark.parametrize("materialize", [True, False])
def test_wrong_tangent_among_several(kind, materialize):
    """The result that is wrong is not the first, and the Function leaves zeros out."""
    result, _ = WRONG_TANGENTS[kind]

    class Wrong(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(materialize)
            return 2 * x, 3 * x

        @staticmethod
        def jvp(ctx, t):
            return 2 * t, result(t)

        @staticmethod
        def backward(ctx, a, b):
            return 2 * a + 3 * b

    here = lz.Linearizer(lambda x: sum(Wrong.apply(x))).at(point())
    v = direction(point())
    with pytest.raises(FunctionContractError, match=r"Wrong\.jvp.*output 1"):
        here.jvp_fn(v)
    close(here.vjp_fn(v)[0], 5 * v)


def test_jvp_may_recover():
    """A call that failed leaves nothing behind."""
    answers = [None, "2 x"]

    class Moody(Doubling):
        @staticmethod
        def jvp(ctx, t):
            return 2 * t if answers.pop(0) else None

    here = lz.Linearizer(lambda x: Moody.apply(x).sin()).at(point())
    v = direction(point())
    with pytest.raises(FunctionContractError):
        here.jvp_fn(v)
    close(here.jvp_fn(v), 2 * v * (2 * point()).cos())


def test_exception_of_the_author():
    """An exception raised by a method reaches the caller as it is."""

    class Raises(Doubling):
        @staticmethod
        def jvp(ctx, t):
            raise ZeroDivisionError("mine")

    here = lz.Linearizer(Raises.apply).at(point())
    v = direction(point())
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="mine"):
            here.jvp_fn(v)
        close(here.vjp_fn(v)[0], 2 * v)


# -- what a backward may return --------------------------------------------------------------

WRONG_GRADIENTS = {
    "too many": (lambda g: (2 * g, g), "2 gradients, expected 1"),
    "none at all": (lambda g: (), "0 gradients, expected 1"),
    "wrong shape": (lambda g: 2 * g[:2], r"shape \(2,\)"),
    "scalar": (lambda g: g.sum(), r"shape \(\)"),
    "a number": (lambda g: 2.0, "float"),
    "an array": (lambda g: g.numpy(), "ndarray"),
    "another device": (lambda g: (2 * g).to("meta"), "meta"),
}


@pytest.mark.parametrize("direct", [True, False], ids=["vjp", "transposed"])
@pytest.mark.parametrize("kind", WRONG_GRADIENTS)
def test_wrong_gradient(kind, direct):
    result, message = WRONG_GRADIENTS[kind]
    methods = {"backward": staticmethod(lambda ctx, g: result(g))}
    Wrong = type("Wrong", (Doubling,), methods)
    here = lz.Linearizer(lambda x: Wrong.apply(x) + x).at(point())
    x = point().requires_grad_()
    with pytest.raises(RuntimeError):  # PyTorch does not take it either
        torch.autograd.grad(Wrong.apply(x), x, direction(x))
    for _ in range(2):
        with pytest.raises(FunctionContractError, match=rf"Wrong\.backward.*{message}"):
            (here.vjp_fn if direct else here.jvp_fn)(direction(point()))
    close(here.value, 3 * point())


def test_gradient_for_an_argument_that_is_no_tensor():
    class Wrong(Function):
        @staticmethod
        def forward(ctx, x, n):
            return n * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g, g

    here = lz.Linearizer(lambda x: Wrong.apply(x, 2)).at(point())
    x = point().requires_grad_()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(Wrong.apply(x, 2), x, direction(x))
    with pytest.raises(FunctionContractError, match=r"Wrong\.backward"):
        here.vjp_fn(direction(point()))


def test_gradient_none_is_zero():
    class Silent(Doubling):
        @staticmethod
        def backward(ctx, g):
            return None

    here = lz.Linearizer(lambda x: Silent.apply(x) + x).at(point())
    v = direction(point())
    close(here.vjp_fn(v)[0], v)
    close(here.jvp_fn(v), v)


def test_too_few_gradients():
    class Few(Function):
        @staticmethod
        def forward(ctx, x, n):
            return n * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    here = lz.Linearizer(lambda x: Few.apply(x, 2)).at(point())
    for product in (here.vjp_fn, here.jvp_fn):
        with pytest.raises(FunctionContractError, match=r"Few\.backward.*1 gradients, expected 2"):
            product(direction(point()))


def test_backward_and_vjp_both_given():
    class Both(Doubling):
        @staticmethod
        def vjp(ctx, g):
            return 2 * g

    here = lz.Linearizer(Both.apply).at(point())
    with pytest.raises(RuntimeError, match="vjp"):
        here.vjp_fn(direction(point()))


# -- memory ----------------------------------------------------------------------------------


class Overwrites(Function):
    """3 x; both methods set what they are given to zero."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, g):
        result = 3 * g
        g.zero_()
        return result

    jvp = backward


def test_methods_that_overwrite_their_argument():
    def f(x):
        y = Overwrites.apply(x)
        return y * 2, y, Overwrites.apply(y), x

    here = lz.Linearizer(f).at(point())
    v = direction(point())
    u = v.clone()
    for _ in range(2):
        close(here.jvp_fn(v), (6 * u, 3 * u, 9 * u, u))
        close(here.vjp_fn((v, v, v, v))[0], 19 * u)
    close(v, u, rtol=0, atol=0)


class Identity(Function):
    """Returns what it is given, in all three methods."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return g

    jvp = backward


def test_methods_that_return_their_argument():
    x, v = point(), direction(point())
    here = lz.Linearizer(Identity.apply).at(x)
    for product in (here.jvp_fn, lambda u: here.vjp_fn(u)[0]):
        result = product(v)
        close(result, v)
        result.zero_()
        assert v.any(), "the result shares no memory with the caller's direction"
    assert here.value.data_ptr() != x.data_ptr()
    here = lz.Linearizer(lambda x: Identity.apply(x) * Identity.apply(x * 2)).at(x)
    close(here.jvp_fn(v), 4 * x * v)
    close(here.vjp_fn(v)[0], 4 * x * v)


def cached(attribute: bool = False) -> type[Function]:
    """Return a Function, x², whose methods write to one buffer that all its calls share."""
    buffer = torch.empty(6, dtype=F64)

    class Cached(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            if attribute:
                ctx.workspace = buffer
            return x**2

        @staticmethod
        def backward(ctx, g):
            torch.mul(g, 2 * ctx.saved_tensors[0], out=buffer)
            return buffer

        jvp = backward

    return Cached


CACHED_GRAPHS = {
    "sum": (lambda x, F: F(x) + F(x.sin()), lambda x: x**2 + x.sin() ** 2),
    "two results": (lambda x, F: (F(x), F(x.sin())), lambda x: (x**2, x.sin() ** 2)),
    "chain": (lambda x, F: F(F(x)) - F(x), lambda x: x**4 - x**2),
}


@pytest.mark.parametrize("attribute", [False, True], ids=["", "kept on ctx"])
@pytest.mark.parametrize("graph", CACHED_GRAPHS)
def test_buffer_that_all_calls_share(graph, attribute):
    """A result must be used, or copied, before the next call overwrites it."""
    custom, plain = CACHED_GRAPHS[graph]
    Cached = cached(attribute)
    x = point()
    v = direction(x)
    here = lz.Linearizer(lambda x: custom(x, Cached.apply)).at(x)
    expected = finite_difference(plain, (x,), (v,))
    # Every Jacobian here is diagonal, so the transpose is the same.
    count = len(expected)
    for _ in range(2):
        close(pytree.tree_leaves(here.jvp_fn(v)), expected, rtol=1e-7, atol=1e-7)
        got = here.vjp_fn(v if count == 1 else (v,) * count)[0]
        close(got, sum(expected), rtol=1e-7, atol=1e-7)


def test_results_of_two_products_share_nothing():
    Cached = cached()
    here = lz.Linearizer(Cached.apply).at(point())
    v = direction(point())
    first, back = here.jvp_fn(v), here.vjp_fn(v)[0]
    kept, kept_back = first.clone(), back.clone()
    here.jvp_fn(2 * v)
    here.vjp_fn(-v)
    close(first, kept, rtol=0, atol=0)
    close(back, kept_back, rtol=0, atol=0)


FREES = """
import itertools
import torch
from torch.autograd import Function
import linearize as lz

def frees(kept):
    class Frees(Function):
        @staticmethod
        def forward(ctx, x):
            y = x.exp()
            if kept == "attribute":
                ctx.y = y.detach()
            else:
                ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, g):
            y = ctx.y if kept == "attribute" else ctx.saved_tensors[0]
            result = g * y
            y.untyped_storage().resize_(0)
            return result

    return Frees.apply

x, u = torch.rand(1000), torch.ones(1000)
for kept, first in itertools.product(("attribute", "saved"), ("vjp", "jvp")):
    here = lz.Linearizer(frees(kept)).at(x)
    products = [here.vjp_fn, here.jvp_fn]
    if first == "vjp":
        torch.testing.assert_close(here.vjp_fn(u)[0], x.exp())
    else:
        products.insert(0, here.jvp_fn)
    refused = 0
    for product in products:
        try:
            product(u)
        except lz.LinearizeError:
            refused += 1
    assert refused >= 2, (kept, first, refused)
    torch.testing.assert_close(here.value, x.exp())
print("alive")
"""


def test_function_that_frees_its_output():
    """The value stays; what was freed is refused. Such code can bring the interpreter down."""
    command = [sys.executable, "-c", FREES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "alive" in done.stdout


# -- tensors changed between forward and products ---------------------------------------------


class Attribute(Function):
    """x², with x as a plain attribute, whose changes PyTorch does not see."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.x * g

    jvp = backward


class Saved(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class SavedForForward(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_forward(x)
        return x * x

    @staticmethod
    def jvp(ctx, dx):
        return 2 * ctx.saved_tensors[0] * dx


def right_or_stale(F, here, v):
    """Either the product at the point, or an error that names the Function; no wrong number."""
    for product in (here.jvp_fn, lambda u: here.vjp_fn(u)[0]):
        try:
            got = product(v)
        except StalenessError as error:
            assert F.__name__ in str(error)  # noqa: PT017 - either outcome is right
        else:
            close(got, 2 * point() * v)


@pytest.mark.parametrize("F", [Attribute, Saved, SavedForForward])
def test_residual_changed_inside_f(F):
    """f itself overwrites what a Function keeps."""

    def f(x):
        h = x * 1
        y = F.apply(h)
        h.mul_(3)
        return y

    here = lz.Linearizer(f).at(point())
    close(here.value, point() ** 2)
    right_or_stale(F, here, direction(point()))


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("F", [Attribute, Saved, SavedForForward])
def test_residual_changed_after_linearizing(F, asked_before):
    kept = []

    def f(x):
        h = x * 1
        kept.append(h)
        return F.apply(h)

    v = direction(point())
    here = lz.Linearizer(f).at(point())
    if asked_before:
        close(here.jvp_fn(v), 2 * point() * v)
        close(here.vjp_fn(v)[0], 2 * point() * v)
    kept[0].detach().mul_(2)
    right_or_stale(F, here, v)
    close(here.value, point() ** 2)
    if F is Attribute:  # its methods read the changed tensor: no product can be right
        with pytest.raises(StalenessError, match="Attribute"):
            here.jvp_fn(v)
        with pytest.raises(StalenessError, match="Attribute"):
            here.vjp_fn(v)


# -- a direction that is missing ---------------------------------------------------------------


def test_neither_method():
    class Bare(Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

    here = lz.Linearizer(lambda x: Bare.apply(x) + x).at(point())
    close(here.value, 3 * point())
    for product in (here.jvp_fn, here.vjp_fn):
        with pytest.raises(MissingDerivativeError, match="Bare"):
            product(direction(point()))


def test_neither_method_off_the_path():
    """A Function that no product needs is no obstacle."""

    class Bare(Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

    here = lz.Linearizer(lambda x, y: (x**2, Bare.apply(y))).at(point(), point(seed=2))
    v = direction(point())
    close(here.vjp_fn((v, None))[0], 2 * point() * v)
    with pytest.raises(MissingDerivativeError, match="Bare"):
        here.vjp_fn((None, v))


def test_errors_are_one_family():
    assert issubclass(FunctionContractError, LinearizeError)
    assert issubclass(MissingDerivativeError, LinearizeError)


def _half_hidden(ctx, g):
    """Return 2 g, of which PyTorch sees a half."""
    return g + opaque(lambda _, h: h)(ctx, g)


def _some_entries_hidden(ctx, g):
    out = torch.zeros_like(g)
    out[:3] = 2 * g[:3]
    out.numpy()[3:] = 2 * g.numpy()[3:]
    return out


def _changed_behind_the_back(ctx, g):
    g.numpy()[:] *= 2
    return g


def _depends_on_the_sign(ctx, g):
    return torch.where(g > 0, 2 * g, 2 * g.abs().neg())


def _clipped(ctx, g):
    return (2 * g).clamp(-1, 1)


def _constant_added(ctx, g):
    return 2 * g + 1e-3


def _number_read(ctx, g):
    return 2 * g / g.norm().item() * torch.linalg.norm(g)


HIDDEN = [
    _half_hidden,
    _some_entries_hidden,
    _changed_behind_the_back,
    _clipped,
    _constant_added,
    _number_read,
]


@pytest.mark.parametrize("backward", HIDDEN, ids=lambda b: b.__name__)
@pytest.mark.parametrize("in_place", [False, True], ids=["", "on a view"])
def test_hidden_parts_are_refused(backward, in_place):
    """What PyTorch cannot follow, or what is not linear, must not be transposed by halves."""

    class Hides(Function):
        @staticmethod
        def forward(ctx, x):
            if in_place:
                ctx.mark_dirty(x)
                return x.mul_(2)
            return 2 * x

    F = type("Hides", (Hides,), {"backward": staticmethod(backward)})

    def f(x):
        h = torch.cat([x, x])
        if in_place:
            F.apply(h[:6])
            return h
        return F.apply(h[:6])

    x = point()
    here = lz.Linearizer(f).at(x)
    v = direction(x)
    expected = native_jvp(lambda x: torch.cat([2 * x, x])[: here.value.numel()], (x,), (v,))
    try:
        got = here.jvp_fn(v)
    except MissingDerivativeError as error:
        assert in_place or "Hides" in str(error)  # noqa: PT017 - a product, if any, must be right
    else:
        close(got, expected)
    if backward in HIDDEN[:3]:  # the linear ones: Jᵀ·u is what the method says
        u = direction(here.value, 5)
        tail = u[6:] if in_place else 0
        close(here.vjp_fn(u)[0], 2 * u[:6] + tail)


def test_linear_in_disguise():
    """A backward that is linear although it looks at signs is transposed or refused."""

    class Signs(Doubling):
        backward = staticmethod(_depends_on_the_sign)

    here = lz.Linearizer(Signs.apply).at(point())
    v = direction(point())
    try:
        got = here.jvp_fn(v)
    except MissingDerivativeError:
        pass
    else:
        close(got, 2 * v)
    close(here.vjp_fn(v)[0], 2 * v)


# -- methods that work on what they keep --------------------------------------------------------


def test_backward_that_overwrites_what_it_keeps():
    """As solvers do that factorize a matrix in place, again at each call."""

    class Solve(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.scale = torch.linspace(1.0, 2.0, 4, dtype=F64)
            ctx.buffer = torch.zeros(4, dtype=F64)
            ctx.save_for_backward(x)
            return x.sin() * ctx.scale

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            ctx.buffer.copy_(ctx.scale)
            ctx.buffer.mul_(x.cos())
            return g * ctx.buffer

    x = point(4)
    here = lz.Linearizer(Solve.apply).at(x)
    expected = torch.linspace(1.0, 2.0, 4, dtype=F64) * x.cos()
    for call in range(4):
        v = direction(x, seed=call)
        torch.testing.assert_close(here.jvp_fn(v), expected * v)
        torch.testing.assert_close(here.vjp_fn(v)[0], expected * v)
