"""Calls of closures, from the first to those that go the short way: all are checked alike."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import linearize as lz
from linearize._torch.modes import set_grad_mode
from tests.support.functions import randn

D = torch.float64
#: More than it takes until nothing is left to decide.
MANY = 12


class Counted(torch.autograd.Function):
    """x sin(x), with counts of calls; both methods leave PyTorch."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.slope = (x.detach().sin() + x.detach() * x.detach().cos()).numpy()
        return x * x.sin()

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        Counted.calls += 1
        return torch.from_numpy(ctx.slope * v.numpy())

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        Counted.calls += 1
        return torch.from_numpy(ctx.slope * u.numpy())


def test_user_code_is_called_once_for_each_product() -> None:
    x, w = randn(4), randn(4, 4)
    here = lz.Linearizer(lambda x: Counted.apply(w @ x).cumsum(0)).at(x)
    z = w @ x
    j = torch.ones(4, 4, dtype=D).tril() @ (torch.diag(z.sin() + z * z.cos()) @ w)
    for call in range(MANY):
        v, u = randn(4, seed=call), randn(4, seed=100 + call)
        before = Counted.calls
        jv, ju = here.jvp_fn(v), here.vjp_fn(u)[0]
        # The first product is checked against the other direction.
        assert call == 0 or Counted.calls == before + 2
        torch.testing.assert_close(jv, j @ v)
        torch.testing.assert_close(ju, j.T @ u)
    (plan,) = here.jvp_fn._plans.values()
    assert plan.quiet
    assert plan._running[0]._function is not None


class Halves(torch.autograd.Function):
    """Two results, of which the backward says nothing where a gradient is missing."""

    says = True

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor | None:
        return 2 * u if Halves.says else None

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return 2 * v


def test_a_value_that_is_undefined_now_and_then_is_zero() -> None:
    x, w = randn(4), randn(4, 4)
    sequel = Counted.apply

    def f(x: torch.Tensor) -> torch.Tensor:
        return Halves.apply(w @ sequel(x)) + sequel(x).cumsum(0) * 3

    here = lz.Linearizer(f, check="never").at(x)
    slope = x.sin() + x * x.cos()
    ones = torch.ones(4, 4, dtype=D).tril()
    try:
        for call in range(MANY):
            Halves.says = call % 3 != 1
            u = randn(4, seed=call)
            expected = 3 * ones.T @ u
            if Halves.says:
                expected = expected + 2 * w.T @ u
            torch.testing.assert_close(here.vjp_fn(u)[0], slope * expected)
    finally:
        Halves.says = True


class Freeing(torch.autograd.Function):
    """Frees memory that is not its own when told to."""

    victim: torch.Tensor | None = None

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        if Freeing.victim is not None:
            Freeing.victim.untyped_storage().resize_(0)
        return v.clone()

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        return u.clone()


def test_memory_that_user_code_frees_is_noticed_before_it_is_read() -> None:
    w = randn(4, 4)
    here = lz.Linearizer(lambda x: w @ Freeing.apply(x)).at(randn(4))
    for call in range(MANY):
        v = randn(4, seed=call)
        torch.testing.assert_close(here.jvp_fn(v), w @ v)
    try:
        Freeing.victim = w
        with pytest.raises(lz.errors.StalenessError, match="freed"):
            here.jvp_fn(randn(4))
    finally:
        Freeing.victim = None
    with pytest.raises(lz.errors.StalenessError, match="freed"):
        here.jvp_fn(randn(4))


class Failing(Counted):
    fails = False

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        if Failing.fails:
            raise ZeroDivisionError
        return Counted.jvp(ctx, v)


@pytest.mark.parametrize("batched", [False, True])
def test_grad_mode_is_what_it_was_after_a_failure(batched: bool) -> None:
    here = lz.Linearizer(Failing.apply).at(randn(4))
    call = here.jvp_fn.batched if batched else here.jvp_fn
    v = randn(3, 4) if batched else randn(4)
    try:
        for fails in [False] * MANY + [True, False]:
            Failing.fails = fails
            if fails:
                with pytest.raises(ZeroDivisionError):
                    call(v)
            else:
                assert not call(v).requires_grad
            assert torch.is_grad_enabled()
            with torch.no_grad():
                if not fails:
                    call(v)
                assert not torch.is_grad_enabled()
    finally:
        Failing.fails = False


def test_grad_mode_is_switched() -> None:
    try:
        set_grad_mode(False)
        assert not torch.is_grad_enabled()
    finally:
        set_grad_mode(True)
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_settled_closure_checks_as_the_first_call_does() -> None:
    w = randn(3, 4)
    here = lz.Linearizer(lambda x: w @ x).at(randn(4))
    for _ in range(200):
        here.jvp_fn(randn(4))
        here.jvp_fn.batched(randn(5, 4))
    (plan,) = here.jvp_fn._plans.values()
    assert plan.quiet
    nested = torch.nested.nested_tensor([randn(4)])
    for wrong in (randn(3), randn(4).float(), randn(1, 4), randn(4).to_sparse(), nested):
        with pytest.raises(lz.errors.SpaceError):
            here.jvp_fn(wrong)
    for wrong in (randn(), randn(4), randn(5, 3), randn(5, 4).float(), randn(5, 4).to_sparse()):
        with pytest.raises(lz.errors.SpaceError):
            here.jvp_fn.batched(wrong)
    v = randn(4).requires_grad_()
    here.jvp_fn(v).sum().backward()
    assert v.grad is not None
    torch.testing.assert_close(v.grad, w.sum(0))
    torch.testing.assert_close(here.jvp_fn(None), torch.zeros(3, dtype=D))
    torch.testing.assert_close(here.jvp_fn.batched(randn(5, 4), chunk_size=2), randn(5, 4) @ w.T)
    w.mul_(2)
    with pytest.raises(lz.errors.StalenessError):
        here.jvp_fn(randn(4))
    with pytest.raises(lz.errors.StalenessError):
        here.jvp_fn.batched(randn(5, 4))
    here.close()
    with pytest.raises(lz.errors.ClosedError):
        here.jvp_fn(randn(4))
    with pytest.raises(lz.errors.ClosedError):
        here.jvp_fn.batched(randn(5, 4))


class Watching(torch.overrides.TorchFunctionMode):
    """Notes which of PyTorch's Python functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("opaque", [False, True])
def test_who_watches_functions_sees_the_users_own_only(opaque: bool) -> None:
    x, w = randn(4), randn(4, 4)
    here = lz.Linearizer(lambda x: Noted.apply(w @ x) if opaque else (w @ x).sin()).at(x)
    slope = torch.ones(4, dtype=D) * 2 if opaque else (w @ x).cos()
    for _ in range(MANY):
        here.jvp_fn(x)
        here.vjp_fn(x)
    with Watching() as seen:
        jv, ju = here.jvp_fn(x), here.vjp_fn(x)[0]
    torch.testing.assert_close(jv, slope * (w @ x))
    torch.testing.assert_close(ju, w.T @ (slope * x))
    assert not {"mul", "mv", "t", "addmm", "mm"} & set(seen.names)
    assert seen.names.count("add") == (2 if opaque else 0)


class Noted(torch.autograd.Function):
    """2x, by an addition in each method."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x + x

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return torch.add(v, v)

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        return torch.add(u, u)


@pytest.mark.parametrize("direction", ["jvp", "vjp"])
def test_the_shortest_way_is_for_what_fits_it_and_refuses_nothing_less(direction: str) -> None:
    w = randn(4, 4)
    here = lz.Linearizer(lambda x: w @ x).at(randn(4))
    fn, j = (here.jvp_fn, w) if direction == "jvp" else (here.vjp_fn, w.T)

    def apply(t: Any) -> torch.Tensor:
        result = fn(t)
        return result if direction == "jvp" else result[0]

    for call in range(3 * MANY):
        v = randn(4, seed=call)
        torch.testing.assert_close(apply(v), j @ v)
    assert fn._short is not None
    assert fn._short(v) is not None
    nested = torch.nested.nested_tensor([randn(4)])
    wrong: list[Any] = [randn(3), randn(4).float(), randn(1, 4), randn(4).to_sparse(), nested, "v"]
    wrong += [(randn(4),), [randn(4)]]
    for given in wrong:
        assert fn._short(given) is None
        with pytest.raises((lz.errors.SpaceError, lz.errors.StructureError)):
            fn(given)
    with pytest.raises(lz.errors.StructureError):
        fn(v, v)
    torch.testing.assert_close(apply(torch.nn.Parameter(v)), j @ v)
    torch.testing.assert_close(apply(None), torch.zeros(4, dtype=D))
    t = v.clone().requires_grad_()
    apply(t).sum().backward()
    assert t.grad is not None
    torch.testing.assert_close(t.grad, j.sum(0))
    many = randn(5, 4)
    torch.testing.assert_close(torch.vmap(apply)(many), many @ j.T)
    torch.testing.assert_close(torch.func.jvp(apply, (v,), (many[0],))[1], j @ many[0])
    with torch.inference_mode():
        torch.testing.assert_close(apply(randn(4)), j @ randn(4))
    result = apply(v)
    result.add_(1)  # belongs to the caller
    torch.testing.assert_close(apply(v), j @ v)
    w.mul_(2)
    with pytest.raises(lz.errors.StalenessError):
        fn(v)
    here.close()
    assert fn._short is None
    with pytest.raises(lz.errors.ClosedError):
        fn(v)


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (lambda d: d["a"].sin(), {"a": randn(4)}),
        (lambda x: (x.sin(), 1), randn(4)),
        (lambda x: (x.sin(), x.cos()), randn(4)),
        (lambda x: [x.sin()], randn(4)),
        (lambda x: (x.sin(),), randn(4)),
    ],
    ids=["dict", "integer beside", "two", "list", "tuple"],
)
def test_other_structures_stay_what_they_are(f: Any, x: Any) -> None:
    here = lz.Linearizer(f).at(x)
    expected = here.jvp_fn(x), here.vjp_fn(here.jvp_fn(x))
    for _ in range(3 * MANY):
        v = here.jvp_fn(x)
        u = here.vjp_fn(v)
    torch.testing.assert_close((v, u), expected)
    assert type(v) is type(expected[0])
    bare = randn(4)
    for fn, takes in ((here.jvp_fn, isinstance(x, torch.Tensor)), (here.vjp_fn, False)):
        if not takes and not isinstance(here.value, torch.Tensor | dict):
            with pytest.raises(lz.errors.StructureError):
                fn(bare)


def test_no_operation_of_a_point_outlives_it() -> None:
    from linearize._programs.program import Operation

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Operation) for o in gc.get_objects())

    def work(seed: int) -> None:
        x, w = randn(4, seed=seed), randn(4, 4)
        here = lz.Linearizer(lambda x: Counted.apply(w @ Noted.apply(x)).cumsum(0)).at(x)
        for _ in range(MANY):
            here.jvp_fn(x)
            here.vjp_fn(x)
            here.jvp_fn.batched(torch.stack([x] * 3))

    work(0)
    before = alive()
    for seed in range(5):
        work(seed)
    assert alive() == before
