"""The memo: what counts as the same point, what is stale, what goes and when."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import linearize as lz
from linearize.errors import ClosedError, StalenessError


class Counted:
    """A function that counts its runs."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f
        self.runs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return self.f(*args, **kwargs)


def point(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers or (1.0, 2.0), dtype=torch.float64)


# -- the same point ----------------------------------------------------------------------------


def test_the_same_objects_are_the_same_point() -> None:
    f = Counted(torch.sin)
    lin = lz.Linearizer(f)
    x = point()
    here = lin.at(x)
    assert lin.at(x) is here
    assert f.runs == 1
    assert lin.at(x.clone()) is not here
    assert lin.at(x.detach()) is not here
    assert f.runs == 3
    stats = lin.stats()
    assert (stats.hits, stats.misses) == (1, 3)


def test_every_part_of_the_arguments_counts() -> None:
    f = Counted(lambda d, y, n=0, *, mode="a", w=None: d["p"] * y + n)
    lin = lz.Linearizer(f)
    p, y, w = point(), point(), point()
    here = lin.at({"p": p}, y, 1, mode="a", w=w)
    assert lin.at({"p": p}, y, 1, mode="a", w=w) is here
    others = [
        lambda: lin.at({"p": y}, p, 1, mode="a", w=w),
        lambda: lin.at({"p": p, "q": p}, y, 1, mode="a", w=w),
        lambda: lin.at({"p": p}, y, 2, mode="a", w=w),
        lambda: lin.at({"p": p}, y, 1.0, mode="a", w=w),
        lambda: lin.at({"p": p}, y, True, mode="a", w=w),
        lambda: lin.at({"p": p}, y, 1, mode="b", w=w),
        lambda: lin.at({"p": p}, y, 1, mode="a", w=p),
        lambda: lin.at({"p": p}, y, 1, mode="a"),
        lambda: lin.at({"p": p}, y, n=1, mode="a", w=w),
    ]
    points = [make() for make in others]
    assert all(q is not here for q in points)
    assert f.runs == 1 + len(others)
    assert lin.at({"p": p}, y, 1, mode="a", w=w) is here


def test_numpy_arguments_count_by_content() -> None:
    f = Counted(lambda x, data: x * float(data.sum()))
    lin = lz.Linearizer(f, argnums=0)
    x, data = point(), np.ones(3)
    here = lin.at(x, data)
    assert lin.at(x, data) is here
    assert lin.at(x, np.ones(3)) is here
    data[0] = 5
    torch.testing.assert_close(lin.at(x, data).value, 7 * x)
    assert f.runs == 2


def test_autocast_and_default_dtype_are_part_of_the_key() -> None:
    W = torch.ones(2, 2)
    f = Counted(lambda x: x @ W + torch.zeros(2, 2).sum())
    lin = lz.Linearizer(f)
    x = torch.ones(2, 2)
    assert lin.at(x).value.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = lin.at(x)
        assert inside is not lin.at(x.clone())
        assert torch.equal(inside.value, f.f(x))
        assert inside.value.dtype == f.f(x).dtype
    with torch.autocast("cpu", torch.float16):
        assert lin.at(x) is not inside
    assert lin.at(x).value.dtype == torch.float32
    runs = f.runs
    try:
        torch.set_default_dtype(torch.float64)
        lin.at(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert f.runs == runs + 1


def test_grad_modes_are_the_same_point() -> None:
    """f always runs under grad mode, so its point is the same."""
    f = Counted(torch.sin)
    lin = lz.Linearizer(f)
    x = point()
    here = lin.at(x)
    with torch.no_grad():
        assert lin.at(x) is here
    with torch.inference_mode():
        assert lin.at(x) is here
    assert f.runs == 1


# -- by value --------------------------------------------------------------------------------


def test_match_by_value() -> None:
    f = Counted(lambda x: x**2)
    lin = lz.Linearizer(f, match="value")
    here = lin.at(point(1, 2))
    assert lin.at(point(1, 2)) is here
    assert lin.at(torch.from_numpy(np.array([1.0, 2.0]))) is here
    assert f.runs == 1
    for other in (point(1, 3), point(1, 2).float(), point(1, 2)[None], point(1, 2, 2)):
        assert lin.at(other) is not here
    assert f.runs == 5


def test_match_by_value_survives_the_callers_buffer() -> None:
    """SciPy hands out one buffer again and again, and writes to it unseen by PyTorch."""
    f = Counted(lambda x: torch.cat([x**2, x]))
    lin = lz.Linearizer(f, match="value")
    buffer = np.array([1.0, 2.0])
    here = lin.at(torch.from_numpy(buffer))
    buffer[:] = [5.0, 6.0]
    there = lin.at(torch.from_numpy(buffer))
    assert there is not here
    one = torch.ones(2, dtype=torch.float64)
    assert here.value.tolist() == [1, 4, 1, 2]
    assert here.jvp_fn(one).tolist() == [2, 4, 1, 1]
    assert there.value.tolist() == [25, 36, 5, 6]
    assert there.jvp_fn(one).tolist() == [10, 12, 1, 1]
    buffer[:] = [1.0, 2.0]
    assert lin.at(torch.from_numpy(buffer)) is here
    assert f.runs == 2


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("wrap", [torch.from_numpy, lambda a: a], ids=["tensor", "array"])
def test_match_by_value_copies_the_other_arguments_too(wrap: Any, keyword: bool) -> None:
    def f(x: torch.Tensor, data: Any) -> torch.Tensor:
        return x * (torch.from_numpy(data) if isinstance(data, np.ndarray) else data)

    lin = lz.Linearizer(f, argnums=0, match="value")
    x, buffer = point(1, 2), np.array([3.0, 4.0])
    here = lin.at(x, data=wrap(buffer)) if keyword else lin.at(x, wrap(buffer))
    buffer[:] = 100.0
    assert here.value.tolist() == [3, 8]
    assert here.jvp_fn(torch.ones_like(x)).tolist() == [3, 4]
    assert here.vjp_fn(torch.ones_like(x))[0].tolist() == [3, 4]


def test_match_by_value_looks_at_bits() -> None:
    f = Counted(lambda x: 1 / x)
    lin = lz.Linearizer(f, match="value")
    nan = lin.at(point(float("nan"), 1))
    assert lin.at(point(float("nan"), 1)) is nan
    assert lin.at(point(0.0)).value.item() == float("inf")
    assert lin.at(point(-0.0)).value.item() == float("-inf")
    assert f.runs == 3


def test_match_by_value_reads_what_a_view_shows() -> None:
    f = Counted(torch.sin)
    lin = lz.Linearizer(f, match="value")
    base = torch.arange(12, dtype=torch.float64).view(3, 4)
    here = lin.at(base.t())
    assert lin.at(base.t().contiguous()) is here
    assert lin.at(base) is not here
    z = torch.tensor([1 + 2j])
    conj = lin.at(z.conj())
    assert lin.at(torch.tensor([1 - 2j])) is conj
    assert lin.at(z) is not conj
    torch.testing.assert_close(conj.value, torch.tensor([1 - 2j]).sin())
    assert lin.at(torch.zeros(0)) is not lin.at(torch.zeros(0, 2))


# -- never stale -------------------------------------------------------------------------------


def test_a_primal_changed_in_place_is_another_point() -> None:
    lin = lz.Linearizer(lambda x: x**2)
    x = point(1, 2)
    lin.at(x)
    changes: list[Callable[[], Any]] = [
        lambda: x.mul_(2),
        lambda: x[0].fill_(7),
        lambda: x.view(1, 2).add_(1),
        lambda: x.detach().add_(1),
        lambda: x.copy_(torch.ones(2)),
    ]
    for change in changes:
        change()
        here = lin.at(x)
        torch.testing.assert_close(here.value, x**2)
        torch.testing.assert_close(here.jvp_fn(torch.ones_like(x)), 2 * x)
    assert lin.stats().hits == 0


class Affine(nn.Module):
    """The parameter and the buffer are only added: autograd saves neither."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("offset", torch.zeros(2, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift + self.offset


def test_changes_of_parameters_and_buffers_are_seen() -> None:
    module = Affine()
    f = Counted(module)
    lin = lz.Linearizer(f)
    x = point(1, 2)
    here = lin.at(x)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module.shift.grad = torch.full_like(module.shift, -3.0)
    optimizer.step()
    assert lin.at(x).value.tolist() == [4, 5]
    module.offset.add_(10)
    assert lin.at(x).value.tolist() == [14, 15]
    assert f.runs == 3
    assert lin.at(x) is not here
    assert f.runs == 3


def test_a_module_whose_buffers_move_in_the_run_is_a_hit_afterwards() -> None:
    """The point is the state after the run: asking again must not move them again."""
    bn = nn.BatchNorm1d(2, dtype=torch.float64)
    f = Counted(bn)
    lin = lz.Linearizer(f)
    x = torch.randn(4, 2, dtype=torch.float64)
    here = lin.at(x)
    assert lin.at(x) is here
    assert int(bn.num_batches_tracked) == 1


def scripted(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    module = Affine()
    module.shift = nn.Parameter(shift, requires_grad=False)
    return torch.jit.script(module)


def in_a_list(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x + torch.stack([shift, shift]).sum(0) / 2


def by_number(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x + shift[0].item()


def by_numpy(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x + torch.from_numpy(shift.numpy().copy())


def by_branch(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x + 5 if shift[0] > 1 else x


def by_keyword(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.add(input=x, other=shift)


def under_no_grad(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    @torch.no_grad()
    def inner() -> torch.Tensor:
        return shift * 1

    return lambda x: x + inner()


def in_vmap(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.vmap(lambda a, b: a + b)(x, shift)


def closed_over_in_vmap(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.vmap(lambda a: a + shift.sum() / 2)(x)


def in_a_backward(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Read only while f itself differentiates something."""

    class Shifted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g + shift

    def f(x: torch.Tensor) -> torch.Tensor:
        (g,) = torch.autograd.grad(Shifted.apply(x).sum(), x)
        return x + g - 1

    return f


def in_a_custom_function(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    class Add(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(x.numpy(force=True) + y.numpy(force=True))

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> Any:
            return g, None

    return lambda x: Add.apply(x, shift)


@pytest.mark.parametrize(
    "make",
    [
        scripted,
        in_a_list,
        by_number,
        by_numpy,
        by_branch,
        by_keyword,
        under_no_grad,
        in_vmap,
        closed_over_in_vmap,
        in_a_backward,
        in_a_custom_function,
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_every_tensor_that_f_read_is_watched(make: Any) -> None:
    """The tensor is only added, so that no residual could tell that it changed."""
    shift = torch.zeros(2, dtype=torch.float64)
    f = Counted(make(shift))
    lin = lz.Linearizer(f)
    x = point(1, 2)
    assert lin.at(x).value.tolist() == [1, 2]
    assert lin.at(x).value.tolist() == [1, 2]
    assert f.runs == 1
    shift.add_(5)
    assert lin.at(x).value.tolist() == [6, 7]
    assert f.runs == 2


def test_a_changed_weight_makes_products_raise() -> None:
    linear = nn.Linear(2, 2, dtype=torch.float64)
    lin = lz.Linearizer(lambda x: linear(x).tanh())
    x = point(1, 2)
    early, late = lin.at(x), lz.Linearizer(lambda x: linear(x).tanh()).at(x)
    late.jvp_fn(x)  # one point recorded before the step, the other not
    late.vjp_fn(x)
    linear(x).sum().backward()
    torch.optim.SGD(linear.parameters(), lr=0.1).step()
    for here in (early, late):
        for product in (here.jvp_fn, here.vjp_fn):
            for _ in range(2):
                with pytest.raises(StalenessError, match=r"changed in place"):
                    product(x)
    new = lin.at(x)
    assert new is not early
    torch.testing.assert_close(new.value, linear(x).tanh().detach())
    expected = (1 - new.value**2) * (linear.weight.detach() @ x)
    torch.testing.assert_close(new.jvp_fn(x), expected)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_a_changed_factor_makes_products_raise(requires_grad: bool, view: bool) -> None:
    """Whether or not it takes part in autograd itself, and through a view of it too."""
    w = point(3, 4).requires_grad_(requires_grad)
    x = point(1, 2)
    here = lz.Linearizer(lambda x: x * (w.view(1, 2)[0] if view else w)).at(x)
    assert here.jvp_fn(x).tolist() == [3, 8]
    assert here.vjp_fn(x)[0].tolist() == [3, 8]
    with torch.no_grad():
        w.mul_(100)
    for product in (here.jvp_fn, here.vjp_fn):
        with pytest.raises(StalenessError):
            product(x)


def test_a_changed_primal_makes_products_and_value_raise() -> None:
    x = point(1, 2)
    here = lz.Linearizer(lambda x: (x**2, x)).at(x)
    x.mul_(3)
    for use in (lambda: here.jvp_fn(x), lambda: here.vjp_fn((x, x)), lambda: here.value):
        with pytest.raises(StalenessError):
            use()


def test_a_change_that_no_product_needs_is_no_reason_to_raise() -> None:
    """x + w: the products do not depend on w, and the value was computed before."""
    w, x = point(10, 20), point(1, 2)
    here = lz.Linearizer(lambda x: x * 2 + w).at(x)
    w.zero_()
    assert here.jvp_fn(x).tolist() == [2, 4]
    assert here.vjp_fn(x)[0].tolist() == [2, 4]
    assert here.value.tolist() == [12, 24]


def test_the_value_changed_in_place_never_gives_wrong_products() -> None:
    """exp saves its output, so that the value is a residual."""
    lin = lz.Linearizer(torch.exp)
    x = point(0, 0)
    here = lin.at(x)
    here.value.mul_(2)
    for product in (here.jvp_fn, here.vjp_fn):
        with pytest.raises(StalenessError):
            product(torch.ones_like(x))
    # Asked again, the memo must not answer with a point that it knows to be spoilt.
    assert lin.at(x).value.tolist() == [1, 1]


@pytest.mark.parametrize("after", ["at", "jvp", "vjp"])
def test_tensors_in_contexts_are_residuals_too(after: str) -> None:
    factor = point(3, 4)

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.factor = factor
            return x * factor

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * ctx.factor

    x = point(1, 1)
    here = lz.Linearizer(Scale.apply).at(x)
    if after == "jvp":
        assert here.jvp_fn(x).tolist() == [3, 4]
    if after == "vjp":
        assert here.vjp_fn(x)[0].tolist() == [3, 4]
    factor.zero_()
    for product in (here.jvp_fn, here.vjp_fn):
        with pytest.raises(StalenessError):
            product(x)


def test_the_gradient_of_a_product_is_not_stale_either() -> None:
    w, x = point(3, 4), point(1, 2)
    here = lz.Linearizer(lambda x: x * w).at(x)
    v = point(1, 1).requires_grad_()
    y = here.jvp_fn(v)
    w.zero_()
    with pytest.raises(StalenessError):
        torch.autograd.grad(y.sum(), v)


def test_clear_for_what_cannot_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "factor"
    file.write_text("1")
    lin = lz.Linearizer(lambda x: x * float(file.read_text()))
    x = point(1, 2)
    old = lin.at(x)
    file.write_text("3")
    assert lin.at(x) is old
    lin.clear()
    assert lin.at(x).value.tolist() == [3, 6]
    assert old.jvp_fn(x).tolist() == [1, 2]


# -- eviction --------------------------------------------------------------------------------


def test_an_entry_goes_with_any_of_its_primals() -> None:
    lin = lz.Linearizer(lambda x, y: x * y)
    x, y = point(), point()
    alive = weakref.ref(lin.at(x, y))
    assert alive() is not None
    assert lin.stats().points == 1
    del y
    gc.collect()
    assert lin.stats().points == 0
    assert lin.stats().evictions == 1
    assert alive() is None


def test_an_entry_goes_with_a_keyword_or_static_argument() -> None:
    class Setting:
        pass

    lin = lz.Linearizer(lambda x, s, w=None: x * 2, argnums=0)
    x = point()
    setting, w = Setting(), point()
    lin.at(x, setting)
    lin.at(x, None, w=w)
    assert lin.stats().points == 2
    del setting
    gc.collect()
    assert lin.stats().points == 1
    del w
    gc.collect()
    assert lin.stats().points == 0


def test_a_new_tensor_at_an_old_address_is_not_the_old_point() -> None:
    lin = lz.Linearizer(lambda x: x * 2)
    for i in range(50):
        x = point(i)
        assert lin.at(x).value.item() == 2 * i
        del x


def test_least_recently_used_goes_first() -> None:
    f = Counted(torch.sin)
    lin = lz.Linearizer(f, maxsize=2)
    a, b, c = (point(i) for i in range(3))
    at_a = lin.at(a)
    lin.at(b)
    assert lin.at(a) is at_a  # now b is the oldest
    lin.at(c)
    assert lin.stats().points == 2
    assert lin.stats().evictions == 1
    runs = f.runs
    assert lin.at(a) is at_a
    assert f.runs == runs
    lin.at(b)
    assert f.runs == runs + 1


@pytest.mark.parametrize("between", ["stats", "product", "bytes"])
def test_looking_at_the_points_is_no_use_of_them(between: str) -> None:
    lin = lz.Linearizer(torch.sin, maxsize=2, max_bytes=1 << 20 if between == "bytes" else None)
    a, b, c = (point(float(i)) for i in range(3))
    kept, other = lin.at(a), lin.at(b)
    assert lin.at(a) is kept  # now b was used least recently
    if between == "stats":
        lin.stats()
    else:
        kept.vjp_fn(torch.ones_like(a))
    lin.at(c)
    assert lin.at(a) is kept
    assert lin.at(b) is not other


def test_points_that_went_stale_do_not_pile_up() -> None:
    w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    lin = lz.Linearizer(lambda x: w * x)
    points = [point(float(i)) for i in range(40)]
    seen = []
    for x in points:
        seen.append(weakref.ref(lin.at(x)))
        lin.at(x).jvp_fn(x)
        with torch.no_grad():
            w.add_(1.0)  # a step of an optimizer
    gc.collect()
    assert sum(ref() is not None for ref in seen) < 12


def test_maxsize_none_and_zero() -> None:
    f = Counted(torch.sin)
    unlimited = lz.Linearizer(f, maxsize=None)
    points = [point(i) for i in range(200)]
    kept = [unlimited.at(p) for p in points]
    assert [unlimited.at(p) for p in points] == kept
    assert f.runs == 200

    f = Counted(torch.sin)
    nothing = lz.Linearizer(f, maxsize=0)
    first, second = nothing.at(points[0]), nothing.at(points[0])
    assert first is not second
    assert f.runs == 2
    torch.testing.assert_close(first.jvp_fn(points[0]), points[0] * points[0].cos())
    stats = nothing.stats()
    assert (stats.hits, stats.misses, stats.points, stats.bytes) == (0, 2, 0, 0)


def test_max_bytes() -> None:
    """Each point keeps a matrix of 8000 bytes of its own."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return x @ (torch.ones(1000, 1, dtype=torch.float64) * 2)

    lin = lz.Linearizer(f, max_bytes=20_000)
    points = [torch.ones(1, 1000, dtype=torch.float64) for _ in range(4)]
    for p in points:
        here = lin.at(p)
        here.jvp_fn(p)
        assert here.nbytes == 8000
    stats = lin.stats()
    assert stats.points == 2
    assert stats.bytes == 16_000
    assert stats.evictions == 2
    assert lin.at(points[-1]) is here

    small = lz.Linearizer(f, max_bytes=100)
    here = small.at(points[0])
    assert small.stats().points == 0
    assert here.jvp_fn(points[0]).item() == 2000


def test_bytes_count_each_storage_once_and_no_primals() -> None:
    w = torch.ones(100, dtype=torch.float64)
    x = torch.ones(100, dtype=torch.float64)
    lin = lz.Linearizer(lambda x: x * w + (x * w.view(10, 10).view(-1)).sum() + x * x)
    here = lin.at(x)
    for _ in range(2):
        assert here.nbytes == 800
        assert lin.stats().bytes == 800
        here.jvp_fn(x)
        here.vjp_fn(x)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_evicts_and_tries_once_more(error: type[BaseException]) -> None:
    failures = 0

    def f(x: torch.Tensor) -> torch.Tensor:
        nonlocal failures
        if failures:
            failures -= 1
            raise error("out of memory")
        return x * 2

    counted = Counted(f)
    lin = lz.Linearizer(counted)
    kept = [point(i) for i in range(3)]
    alive = [weakref.ref(lin.at(p)) for p in kept]
    failures = 1
    x = point()
    here = lin.at(x)
    assert counted.runs == 5
    assert here.value.tolist() == [2, 4]
    gc.collect()
    assert [r() for r in alive] == [None] * 3
    stats = lin.stats()
    assert (stats.points, stats.evictions, stats.misses) == (1, 3, 4)

    failures = 2
    with pytest.raises(error, match="out of memory"):
        lin.at(point())
    assert counted.runs == 7
    assert lin.at(x).value.tolist() == [2, 4]


def test_other_errors_are_not_tried_again() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the model has not enough memory cells")

    counted = Counted(f)
    with pytest.raises(RuntimeError, match="memory cells"):
        lz.Linearizer(counted).at(point())
    assert counted.runs == 1


# -- scopes ------------------------------------------------------------------------------------


def test_the_scope_of_a_linearizer() -> None:
    x, y = point(), point()
    f = Counted(torch.sin)
    lin = lz.Linearizer(f)
    before = lin.at(x)
    with lin as same:
        assert same is lin
        assert lin.at(x) is before
        inside = lin.at(y)
        jvp_fn, vjp_fn = inside.jvp_fn, inside.vjp_fn
        jvp_fn(y)
    for use in (lambda: jvp_fn(y), lambda: vjp_fn(y), lambda: inside.value):
        with pytest.raises(ClosedError):
            use()
    torch.testing.assert_close(before.jvp_fn(x), x * x.cos())
    assert lin.at(x) is before
    assert lin.stats().points == 1
    again = lin.at(y)  # the Linearizer itself goes on
    assert again is not inside
    torch.testing.assert_close(again.jvp_fn(y), y * y.cos())


def test_nested_scopes() -> None:
    x, y, z = point(), point(), point()
    lin = lz.Linearizer(torch.sin)
    with lin:
        outer = lin.at(x)
        with lin:
            inner = lin.at(y)
        assert inner.closed
        assert not outer.closed
        later = lin.at(z)
    assert outer.closed
    assert later.closed


def test_a_scope_ends_with_an_exception() -> None:
    x = point()
    lin = lz.Linearizer(torch.sin)
    with pytest.raises(KeyError), lin:  # noqa: PT012
        here = lin.at(x)
        raise KeyError
    assert here.closed


def test_the_scope_closes_points_that_the_memo_has_dropped() -> None:
    with lz.Linearizer(torch.sin, maxsize=1) as lin:
        x, y = point(), point()
        first, second = lin.at(x), lin.at(y)
    assert first.closed
    assert second.closed


def test_the_scope_of_a_point() -> None:
    x = point()
    f = Counted(torch.sin)
    lin = lz.Linearizer(f)
    with lin.at(x) as here:
        torch.testing.assert_close(here.jvp_fn(x), x * x.cos())
    with pytest.raises(ClosedError):
        here.jvp_fn(x)
    assert lin.stats().points == 0  # it went by itself
    again = lin.at(x)
    assert again is not here
    assert not again.closed
    stats = lin.stats()
    assert (stats.hits, stats.misses, f.runs) == (0, 2, 2)


def test_a_closed_point_takes_nobodys_place() -> None:
    f = Counted(torch.sin)
    lin = lz.Linearizer(f, maxsize=2)
    a, b, c = point(1), point(2), point(3)
    at_a = lin.at(a)
    lin.at(b).close()
    lin.at(c)
    assert lin.at(a) is at_a
    assert f.runs == 3


def test_closing_the_linearizer() -> None:
    x, y = point(), point()
    lin = lz.Linearizer(torch.sin, maxsize=1)
    jvp_fn = lin.at(x).jvp_fn  # its point is gone from the memo, the closure is not
    here = lin.at(y)
    lin.close()
    for product in (jvp_fn, here.jvp_fn, here.vjp_fn):
        with pytest.raises(ClosedError):
            product(x)
    assert lin.stats().points == 0


# -- statistics and recursion ------------------------------------------------------------------


def test_stats() -> None:
    lin = lz.Linearizer(torch.sin)
    assert lin.stats() == lz.Stats()
    x = point()
    lin.at(x)
    lin.at(x)
    stats = lin.stats()
    assert stats == lz.Stats(hits=1, misses=1, evictions=0, points=1, bytes=stats.bytes)
    assert stats["hits"] == stats.hits == 1
    with pytest.raises(KeyError):
        stats["nonsense"]
    lin.clear()
    assert lin.stats() == lz.Stats(hits=1, misses=1, evictions=1)


def test_a_miss_is_counted_when_f_raises() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        raise KeyError

    lin = lz.Linearizer(f)
    with pytest.raises(KeyError):
        lin.at(point())
    assert lin.stats() == lz.Stats(misses=1)


@pytest.mark.parametrize("match", ["identity", "value"])
def test_f_may_linearize_itself(match: Any) -> None:
    """Newton's step for the fixed point, inside the function that is being linearized."""

    def f(x: torch.Tensor, depth: int) -> torch.Tensor:
        if depth == 0:
            return x**2
        below = lin.at(x.detach(), depth - 1)
        return x * below.jvp_fn(torch.ones_like(x))

    lin = lz.Linearizer(f, argnums=0, match=match)
    x = point(1, 2)
    here = lin.at(x, 2)
    # depth 1: x * 2c with c fixed; depth 2: x * 2c, because the slope of x * 2c is 2c.
    torch.testing.assert_close(here.value, 2 * x * x)
    torch.testing.assert_close(here.jvp_fn(torch.ones_like(x)), 2 * x)


def test_f_may_ask_for_its_own_point() -> None:
    """With matching by value the inner call has the key of the outer one: no deadlock."""
    inside = False

    def f(x: torch.Tensor) -> torch.Tensor:
        nonlocal inside
        if inside:
            return x**2
        inside = True
        return x**2 + lin.at(x).value

    lin = lz.Linearizer(f, match="value")
    x = point(1, 2)
    assert lin.at(x).value.tolist() == [2, 8]
