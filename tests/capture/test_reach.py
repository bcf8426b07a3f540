"""The memo answers only where everything that f can reach is the same."""

from __future__ import annotations

import array
import contextvars
import dataclasses
import enum
import functools
import gc
import itertools
import mmap
import multiprocessing
import operator
import random
import sys
import threading
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import linearize as lz
from linearize.errors import MemoWarning, OptionError

X = torch.tensor([1.0, 2.0], dtype=torch.float64)

SCALE: Any = 1.0
TABLE: Any = {"scale": 1.0}


def of_globals(x: torch.Tensor) -> torch.Tensor:
    return x * SCALE


def of_a_global_dict(x: torch.Tensor) -> torch.Tensor:
    return x * TABLE["scale"]


def outer(x: torch.Tensor) -> torch.Tensor:
    return inner(x)


def inner(x: torch.Tensor) -> torch.Tensor:
    return x * SCALE


class Config:
    scale: Any = 1.0


def of_a_class(x: torch.Tensor) -> torch.Tensor:
    return x * Config.scale


def set_global(value: Any) -> None:
    global SCALE
    SCALE = value


def set_table(value: Any) -> None:
    TABLE["scale"] = value


def set_class(value: Any) -> None:
    Config.scale = value


#: A function, and what changes the factor that it multiplies by.
Case = tuple[Callable[..., Any], Callable[[Any], Any]]


def closure() -> Case:
    scale: Any = 1.0

    def change(value: Any) -> None:
        nonlocal scale
        scale = value

    return lambda x: x * scale, change


def closure_of_a_nested_function() -> Case:
    scale: Any = 1.0

    def f(x: torch.Tensor) -> torch.Tensor:
        return sum(x * scale for _ in range(1))

    def change(value: Any) -> None:
        nonlocal scale
        scale = value

    return f, change


def keyword_default() -> Case:
    def f(x: torch.Tensor, *, scale: Any = 1.0) -> torch.Tensor:
        return x * scale

    return f, lambda value: f.__kwdefaults__.update(scale=value)


def default() -> Case:
    def f(x: torch.Tensor, scale: Any = 1.0) -> torch.Tensor:
        return x * scale

    def change(value: Any) -> None:
        f.__defaults__ = (value,)

    return f, change


def function_attribute() -> Case:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x * f.scale  # type: ignore[attr-defined]

    f.scale = 1.0  # type: ignore[attr-defined]
    return f, lambda value: setattr(f, "scale", value)


def a_partial() -> Case:
    holder = [1.0]
    return functools.partial(lambda s, x: x * s[0], holder), lambda v: holder.__setitem__(0, v)


def a_partial_keyword() -> Case:
    f = functools.partial(lambda x, s: x * s, s=1.0)
    return f, lambda value: f.keywords.update(s=value)


def in_a_list() -> Case:
    scales = [None, [1.0]]
    return lambda x: x * scales[1][0], lambda v: scales[1].__setitem__(0, v)  # type: ignore[index]


def in_a_deque() -> Case:
    scales = deque([1.0])
    return lambda x: x * scales[0], lambda v: (scales.clear(), scales.append(v))


def in_an_ordered_dict() -> Case:
    scales = OrderedDict(a=1.0)
    return lambda x: x * scales["a"], lambda v: scales.update(a=v)


def in_a_set() -> Case:
    scales = {1.0}
    return lambda x: x * max(scales), lambda v: (scales.clear(), scales.add(v))


def in_an_array() -> Case:
    scales = np.ones(3)
    return lambda x: x * float(scales[1]), lambda v: scales.__setitem__(1, v)


def in_a_strided_array() -> Case:
    scales = np.ones((3, 4)).T[::2]
    return lambda x: x * float(scales[1, 1]), lambda v: scales.__setitem__((1, 1), v)


def in_an_array_of_objects() -> Case:
    scales = np.array([None, [1.0]], dtype=object)
    return lambda x: x * scales[1][0], lambda v: scales[1].__setitem__(0, v)


def in_a_buffer() -> Case:
    scales = array.array("d", [1.0])
    return lambda x: x * scales[0], lambda v: scales.__setitem__(0, v)


class Model:
    def __init__(self) -> None:
        self.scale: Any = 1.0

    @property
    def factor(self) -> Any:
        return self.scale

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        return self.helper(x)

    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def attribute_of_self() -> Case:
    model = Model()
    return model, lambda value: setattr(model, "scale", value)


def bound_method() -> Case:
    model = Model()
    return model.residual, lambda value: setattr(model, "scale", value)


def named_by_a_string() -> Case:
    model = Model()
    return lambda x: x * getattr(model, "sca" + "le"), lambda v: setattr(model, "scale", v)


def named_by_a_getter() -> Case:
    model, get = Model(), operator.attrgetter("scale")
    return lambda x: x * get(model), lambda v: setattr(model, "scale", v)


def a_method_bound_anew() -> Case:
    model = Model()

    def change(value: Any) -> None:
        model.helper = lambda x: x * value  # type: ignore[method-assign]

    return model.residual, change


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale: Any = 1.0


def slots() -> Case:
    held = Slotted()
    return lambda x: x * held.scale, lambda value: setattr(held, "scale", value)


@dataclasses.dataclass
class Settings:
    scale: Any = 1.0


def a_dataclass() -> Case:
    held = Settings()
    return lambda x: x * held.scale, lambda value: setattr(held, "scale", value)


def a_namespace() -> Case:
    held = types.SimpleNamespace(scale=1.0)
    return lambda x: x * held.scale, lambda value: setattr(held, "scale", value)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale: Any = 1.0
        self.inner = nn.Sequential(nn.Identity(), nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


def attribute_of_a_module() -> Case:
    net = Net()
    return net, lambda value: setattr(net, "scale", value)


def attribute_of_a_module_below() -> Case:
    net = nn.Sequential(nn.Identity(), nn.Sequential(Net()))
    return net, lambda value: setattr(net[1][0], "scale", value)


def a_parameter_bound_anew() -> Case:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.change(1.0)

        def change(self, value: float) -> None:
            self.scale = nn.Parameter(torch.tensor(value, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    net = Scaled()
    return nn.Sequential(net), net.change


def a_buffer_bound_anew() -> Case:
    net = nn.Module()
    net.register_buffer("scale", torch.tensor(1.0, dtype=torch.float64))
    return lambda x: x * net.scale, lambda v: setattr(
        net, "scale", torch.tensor(v, dtype=torch.float64)
    )


def a_module_replaced() -> Case:
    net = nn.Sequential(nn.Identity())

    def change(value: float) -> None:
        layer = Net()
        layer.scale = value
        net[0] = layer

    return net, change


def a_hook() -> Case:
    net = nn.Sequential(nn.Identity())
    return net, lambda v: net[0].register_forward_hook(lambda m, a, y: y * v)


def a_setting_of_a_layer() -> Case:
    net = nn.Sequential(nn.Hardtanh(-1.0, 1.0))
    return lambda x: x * net(torch.full((), 1e3)), lambda v: setattr(net[0], "max_val", v)


def a_global_variable() -> Case:
    return of_globals, set_global


def a_global_of_a_function_that_is_called() -> Case:
    return outer, set_global


def an_entry_of_a_global_dict() -> Case:
    return of_a_global_dict, set_table


def a_class_attribute() -> Case:
    return of_a_class, set_class


def a_wrapped_function() -> Case:
    scale: Any = 1.0

    @torch.no_grad()
    def factor() -> Any:
        return scale

    def change(value: Any) -> None:
        nonlocal scale
        scale = value

    return lambda x: x * factor(), change


def a_cached_function() -> Case:
    held = [1.0]

    @functools.lru_cache(maxsize=0)
    def factor() -> Any:
        return held[0]

    return lambda x: x * factor(), lambda v: held.__setitem__(0, v)


def a_transformed_function() -> Case:
    held = [1.0]
    return torch.vmap(lambda x: x * held[0]), lambda v: held.__setitem__(0, v)


def a_custom_function() -> Case:
    class Scale(torch.autograd.Function):
        factor: Any = 1.0

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.factor = Scale.factor
            return x * Scale.factor

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * ctx.factor

    return Scale.apply, lambda value: setattr(Scale, "factor", value)


def a_python_module() -> Case:
    module = types.ModuleType("settings_of_a_test")
    module.scale = 1.0  # type: ignore[attr-defined]
    return lambda x: x * module.scale, lambda v: setattr(module, "scale", v)


def a_tensor_bound_anew() -> Case:
    scale = torch.tensor(1.0, dtype=torch.float64)

    def change(value: Any) -> None:
        nonlocal scale
        scale = torch.tensor(value, dtype=torch.float64)

    return lambda x: x * scale, change


def read_in_another_thread() -> Case:
    scale = torch.tensor(1.0, dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        found: list[float] = []
        thread = threading.Thread(target=lambda: found.append(scale.numpy().item()))
        thread.start()
        thread.join()
        return x * found[0]

    return f, scale.fill_


def in_a_default_dict() -> Case:
    table: defaultdict[str, Any] = defaultdict(float, scale=1.0)
    return lambda x: x * table["scale"], lambda v: table.update(scale=v)


def by_a_method_of_a_dict() -> Case:
    table: dict[str, Any] = {"scale": 1.0}
    get = table.get
    return lambda x: x * get("scale"), lambda v: table.update(scale=v)


class Row(list[float]):
    scale: Any


def attribute_of_a_list() -> Case:
    row = Row()
    row.scale = 1.0
    return lambda x: x * row.scale, lambda v: setattr(row, "scale", v)


class Incomparable(nn.Module):
    scale: Any = 1.0

    def __eq__(self, other: object) -> bool:  # and so it has no hash
        return False


def a_module_without_a_hash() -> Case:
    module = Incomparable()
    return lambda x: x * module.scale, lambda v: setattr(module, "scale", v)


def imported_when_it_runs() -> Case:
    module = sys.modules["settings_of_an_import"] = types.ModuleType("settings_of_an_import")
    module.scale = 1.0  # type: ignore[attr-defined]

    def f(x: torch.Tensor) -> torch.Tensor:
        import settings_of_an_import as settings  # type: ignore[import-not-found]

        return x * settings.scale

    return f, lambda v: setattr(module, "scale", v)


def beside_a_variable_without_a_value() -> Case:
    scale: Any = 1.0

    def change(value: Any) -> None:
        nonlocal scale, later
        scale = later = value

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * scale if scale < 2 else x * later

    if scale > 1:
        later = 1.0
    return f, change


def a_context_variable() -> Case:
    scale: contextvars.ContextVar[Any] = contextvars.ContextVar("scale", default=1.0)
    return lambda x: x * scale.get(), scale.set


def of_this_thread() -> Case:
    local = threading.local()
    local.scale = 1.0
    return lambda x: x * local.scale, lambda v: setattr(local, "scale", v)


CASES = [
    value
    for name, value in list(globals().items())
    if getattr(value, "__annotations__", {}).get("return") == "Case" and not name.startswith("_")
]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    set_global(1.0)
    set_table(1.0)
    set_class(1.0)


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_a_change_of_what_f_reaches_is_seen(make: Callable[[], Case]) -> None:
    f, change = make()
    lin = lz.Linearizer(f)
    x, ones = X.clone(), torch.ones_like(X)
    here = lin.at(x)
    torch.testing.assert_close(here.value, x)
    assert lin.at(x) is here
    assert lin.at(x) is here
    change(3.0)
    there = lin.at(x)
    torch.testing.assert_close(there.value, 3 * x)
    for _ in range(4):
        torch.testing.assert_close(there.jvp_fn(ones), 3 * ones)
        torch.testing.assert_close(there.vjp_fn(ones)[0], 3 * ones)
    assert lin.at(x) is there


@pytest.mark.parametrize("make", [closure, attribute_of_self, in_a_list, attribute_of_a_module])
@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (2.0, 2.0, True),
        (2.0, float("2.0"), True),
        (1000003, int("1000003"), True),
        (0.0, -0.0, False),
        (1, True, False),
        (1, 1.0, False),
        (float("nan"), float("nan"), True),
        (complex(0.0, 0.0), complex(0.0, -0.0), False),
    ],
)
def test_numbers_are_compared_by_their_bits(
    make: Callable[[], Case], before: Any, after: Any, same: bool
) -> None:
    f, change = make()
    change(before)
    lin = lz.Linearizer(f)
    x = X.clone()
    here = lin.at(x)
    change(after)
    assert (lin.at(x) is here) is same


def test_time_stepping_with_the_previous_state_in_a_variable() -> None:
    """Implicit Euler for u' = -u³ by Newton: the first point of a step is the last of another."""

    def simulate(at: Callable[[Any], Callable[..., lz.Linearization]]) -> torch.Tensor:
        previous = X.clone()

        def residual(u: torch.Tensor) -> torch.Tensor:
            return u - previous + 0.1 * u**3

        solve = at(residual)
        for _ in range(4):
            u = previous
            for _ in range(20):
                here = solve(u)
                if here.value.abs().max() < 1e-12:
                    break
                u = u - here.value / here.jvp_fn(torch.ones_like(u))
            previous = u
        return previous

    expected = simulate(lambda f: lz.Linearizer(f, maxsize=0).at)
    torch.testing.assert_close(simulate(lambda f: lz.Linearizer(f).at), expected)
    assert (expected - X).abs().max() > 0.1


def test_training_mode_is_seen() -> None:
    net = nn.Sequential(nn.Sequential(nn.Dropout(0.5)))
    lin = lz.Linearizer(net)
    x = torch.ones(50)
    assert not torch.equal(lin.at(x).value, x)
    net.eval()
    assert torch.equal(lin.at(x).value, x)
    assert lin.at(x) is lin.at(x)


# -- what makes no difference ------------------------------------------------------------------


def test_what_f_only_counts_or_notes_is_no_change() -> None:
    runs, seen, table = 0, [], {"runs": 0}

    class Counted:
        def __init__(self) -> None:
            self.runs = 0
            self.log: list[Any] = []

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal runs
            runs += 1
            seen.append(x.sum().item())
            table["runs"] += 1
            table["last"] = x
            self.runs += 1
            self.log.append((x.shape, str(x.dtype)))
            self.last = x
            return x.sin()

    lin = lz.Linearizer(Counted())
    x, y = X.clone(), X.clone()
    here, there = lin.at(x), lin.at(y)
    assert lin.at(x) is here
    assert lin.at(y) is there
    assert runs == len(seen) == table["runs"] == 2


def test_attributes_that_f_does_not_name_make_no_difference() -> None:
    model = Model()
    model.step = 0  # type: ignore[attr-defined]
    model.file = object()  # type: ignore[attr-defined]
    lin = lz.Linearizer(model.residual)
    x = X.clone()
    here = lin.at(x)
    model.step = 1  # type: ignore[attr-defined]
    model.file = object()  # type: ignore[attr-defined]
    assert lin.at(x) is here


def test_what_is_bound_back_is_the_same_again() -> None:
    net = nn.Sequential(nn.Dropout(0.5))
    lin = lz.Linearizer(net)
    x = torch.ones(50)
    here = lin.at(x)
    net.eval()
    net.train()
    assert lin.at(x) is here


def test_cycles_and_what_is_met_twice() -> None:
    inner: list[Any] = [1.0]
    ring: list[Any] = [inner, inner]
    ring.append(ring)
    other: list[Any] = [2.0]
    lin = lz.Linearizer(lambda x: x * ring[1][0] + 0 * other[0])
    x = X.clone()
    here = lin.at(x)
    assert lin.at(x) is here
    ring[1] = [1.0]  # equal, but no longer one list
    assert lin.at(x) is not here


@pytest.mark.parametrize("method", [False, True])
def test_modules_that_refer_to_each_other_can_go(method: bool) -> None:
    net = nn.Sequential(Net(), nn.Linear(2, 2).double())
    net[0].parent = [net]
    net[0].register_forward_hook(lambda *_, n=net: None)
    gone = weakref.ref(net)
    lin = lz.Linearizer(net.forward if method else net)
    lin.at(X.clone()).jvp_fn(X)
    lin.at(X.clone())
    del net, lin
    gc.collect()
    assert gone() is None


def test_a_tensor_in_reach_is_not_kept() -> None:
    held: list[Any] = [torch.ones(2).double()]
    lin = lz.Linearizer(lambda x: x * held[0] if held else x)
    x = X.clone()
    lin.at(x)
    gone = weakref.ref(held[0])
    held.clear()
    lin.clear()
    gc.collect()
    assert gone() is None
    torch.testing.assert_close(lin.at(x).value, x)


# -- static arguments ----------------------------------------------------------------------------


class Color(enum.Enum):
    ONE = 1


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: {1.0}, lambda s: (s.clear(), s.add(3.0))),
        (Settings, lambda s: setattr(s, "scale", 3.0)),
        (Model, lambda s: setattr(s, "scale", 3.0)),
        (lambda: bytearray(b"\x01"), lambda s: s.__setitem__(0, 3)),
        (lambda: lambda held=[1.0]: held, lambda s: s().__setitem__(0, 3.0)),
    ],
    ids=["set", "dataclass", "object", "buffer", "function"],
)
@pytest.mark.parametrize("keyword", [False, True])
def test_a_static_argument_changed_in_place_is_seen(make: Any, change: Any, keyword: bool) -> None:
    def f(x: torch.Tensor, held: Any) -> torch.Tensor:
        if isinstance(held, (set, bytearray)):
            return x * max(held)
        return x * (held()[0] if callable(held) and not hasattr(held, "scale") else held.scale)

    lin = lz.Linearizer(f, argnums=0)
    x, held = X.clone(), make()

    def at() -> lz.Linearization:
        return lin.at(x, held=held) if keyword else lin.at(x, held)

    here = at()
    assert at() is here
    change(held)
    torch.testing.assert_close(at().value, 3 * x)


# -- what cannot be looked into ------------------------------------------------------------------


def counted_entry(held: Any) -> float:
    held[0] += 2
    return float(held[0] - 1)


def counted_number(held: Any) -> float:
    held.value += 2.0
    return float(held.value - 1)


def hidden() -> dict[str, Any]:
    """Objects whose state cannot be seen, each with a function of it."""
    return {
        "memory map": (mmap.mmap(-1, 1), counted_entry),
        "shared number": (multiprocessing.Value("d", 0.0), counted_number),
        "iterator": (itertools.cycle([1.0, 3.0]), next),
        "generator": ((s for s in (1.0, 3.0, 5.0)), next),
        "list iterator": (iter([1.0, 3.0, 5.0]), next),
    }


@pytest.mark.parametrize("name", hidden())
def test_a_point_is_not_remembered_where_something_hides_its_state(name: str) -> None:
    held, read = hidden()[name]
    lin = lz.Linearizer(lambda x: x * read(held))
    x = X.clone()
    torch.testing.assert_close(lin.at(x).value, x)
    with pytest.warns(MemoWarning, match=r"held \(.*unseen=\"constant\""):
        there = lin.at(x)
    torch.testing.assert_close(there.value, 3 * x)
    with warnings.catch_warnings():  # told once
        warnings.simplefilter("error")
        lin = lz.Linearizer(lambda x: x)
    assert lin.stats().points == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_trace_that_holds_a_tensor_is_not_trusted() -> None:
    scale = torch.ones(2, dtype=torch.float64)
    traced = torch.jit.trace(lambda x: x * scale, X)
    lin = lz.Linearizer(lambda x: traced(x))
    x = X.clone()
    torch.testing.assert_close(lin.at(x).value, x)
    scale.fill_(3.0)
    with pytest.warns(MemoWarning, match="traced"):
        torch.testing.assert_close(lin.at(x).value, traced(x))
    plain = torch.jit.trace(lambda x: x.sin(), X)
    lin = lz.Linearizer(lambda x: plain(x))
    assert lin.at(x) is lin.at(x)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift.tan()


def by_a_traced_method() -> tuple[torch.Tensor, Callable[..., Any]]:
    module = torch.jit.trace(Shifted(), X)
    method = module.forward
    return module.shift, lambda x: method(x)


def by_a_future() -> tuple[torch.Tensor, Callable[..., Any]]:
    shift = torch.zeros(2, dtype=torch.float64)
    future: Any = torch.futures.Future()
    future.set_result(shift)
    return shift, lambda x: x + future.value().tan()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [by_a_traced_method, by_a_future])
def test_what_holds_a_tensor_in_c_is_not_trusted(make: Any) -> None:
    """Operations on the tensor itself are out of sight, and no node of the graph keeps it."""
    shift, f = make()
    lin = lz.Linearizer(f)
    x = X.clone()
    torch.testing.assert_close(lin.at(x).value, x)
    shift.fill_(torch.pi / 4)
    with pytest.warns(MemoWarning, match="method|future"):
        torch.testing.assert_close(lin.at(x).value, x + 1)


class Contrary:
    """An object that raises whatever it is asked."""

    __slots__ = ("one",)

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise ValueError("no")


def test_an_object_that_raises_when_looked_at_costs_the_memo_only() -> None:
    held = Contrary()
    lin = lz.Linearizer(lambda x: x * (2 if held else 3))
    x = X.clone()
    torch.testing.assert_close(lin.at(x).value, 2 * x)
    with pytest.warns(MemoWarning, match="ValueError: no"):
        torch.testing.assert_close(lin.at(x).value, 2 * x)


def test_the_caller_can_vouch_for_it() -> None:
    held = itertools.repeat(2.0)
    lin = lz.Linearizer(lambda x: x * next(held), unseen="constant")
    x = X.clone()
    assert lin.at(x) is lin.at(x)
    with pytest.raises(OptionError, match="unseen"):
        lz.Linearizer(torch.sin, unseen="no")  # type: ignore[arg-type]


def test_generators_of_random_numbers_are_left_alone() -> None:
    """A random draw is part of the run, as it was."""
    draw, numpy_draw = random.Random(0), np.random.default_rng(0)
    generator = torch.Generator()
    lin = lz.Linearizer(
        lambda x: (
            x * draw.random() * numpy_draw.random() * torch.rand(2, generator=generator).double()
        )
    )
    x = X.clone()
    assert lin.at(x) is lin.at(x)


# -- what is noted of modules, for the whole process ---------------------------------------------


class Equal(nn.Module):
    """Equal to others of its kind, whatever they hold."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("weight", torch.full((2,), scale, dtype=torch.float64))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    def __hash__(self) -> int:
        return 7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale * self.weight


def test_modules_that_are_equal_are_not_taken_for_each_other() -> None:
    nets = [Equal(2.0), Equal(3.0)]
    lins = [lz.Linearizer(net) for net in nets]
    for _ in range(2):
        for net, lin in zip(nets, lins, strict=True):
            assert torch.equal(lin.at(X).value, net(X))
            assert lin.at(X) is lin.at(X)
    nets[1].scale = 4.0
    assert torch.equal(lins[1].at(X).value, nets[1](X))
    nets[1].weight = torch.full((2,), 5.0, dtype=torch.float64)
    assert torch.equal(lins[1].at(X).value, nets[1](X))


def test_a_buffer_bound_anew_is_seen_whatever_its_identity() -> None:
    """A dead tensor's identity is given to the next one: thirty times, to be sure of some."""
    net = nn.Module()
    net.register_buffer("shift", torch.zeros(2, dtype=torch.float64))
    lin = lz.Linearizer(lambda x: x.sin() + net.shift)  # its graph does not keep it
    lin.at(X)
    same = 0
    for i in range(30):
        before = id(net.shift)
        del net.shift
        net.register_buffer("shift", torch.full((2,), float(i), dtype=torch.float64))
        same += id(net.shift) == before
        assert torch.equal(lin.at(X).value, X.sin() + i)
    assert same


def test_one_network_in_two_linearizers_and_in_a_later_one() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Dropout(0.0)).double()
    lins = [lz.Linearizer(net), lz.Linearizer(lambda x: net(x))]
    here = [lin.at(X) for lin in lins]
    assert all(lin.at(X) is point for lin, point in zip(lins, here, strict=True))
    net[0].weight = nn.Parameter(torch.eye(2, dtype=torch.float64))
    for lin in (*lins, lz.Linearizer(net)):
        assert torch.equal(lin.at(X).value, net(X).detach())
    net[1] = nn.Sigmoid()
    for lin in (*lins, lz.Linearizer(net)):
        assert torch.equal(lin.at(X).value, net(X).detach())


def test_nothing_is_left_on_parameters_when_the_linearizer_is_gone() -> None:
    net = nn.Linear(2, 2).double()
    lin = lz.Linearizer(net)
    lin.at(X)
    del lin
    gc.collect()
    assert not any(weakref.getweakrefs(p) for p in net.parameters())
