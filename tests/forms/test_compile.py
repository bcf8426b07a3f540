"""Compiled programs: the same numbers, compiled once for all points, opaque code still called."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.autograd import Function
from torch.autograd.functional import jacobian

import linearize as lz
from linearize._execute.binding import Binding
from linearize._execute.executor import Executor
from linearize._forms import compiled as _compile
from linearize._forms.cuda_graphs import Replays
from linearize._forms.segments import Segments, Stretch
from linearize._programs.program import Equation, Operation, Program
from linearize._programs.values import Var
from linearize._spaces.space import TensorSpec
from linearize._torch.names import aten
from linearize.errors import CompilationWarning, OptionError, StalenessError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

N = 12
X = torch.linspace(-1, 1, N, dtype=torch.float64)
V = torch.linspace(1, 2, N, dtype=torch.float64).cos()
W = torch.linspace(0, 9, N * N, dtype=torch.float64).sin().reshape(N, N)


class Backend:
    """Stands for Inductor: counts what it compiles and what then runs."""

    def __init__(self, change: Callable[[Any], Any] = lambda y: y) -> None:
        self.graphs = self.runs = 0
        self.change = change

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: torch.Tensor) -> Any:
            self.runs += 1
            return [self.change(y) for y in graph.forward(*args)]

        return run


@pytest.fixture
def always_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compile, "worth", lambda program: True)


def f(x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = W @ (x.roll(1) * x.sin()) / 10 + x
    return x


@pytest.mark.usefixtures("always_quicker")
def test_one_compilation_serves_all_points() -> None:
    runs, backend = 0, Backend()

    def counted(x: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return f(x)

    lin = lz.Linearizer(counted, compile={"backend": backend})
    for k in range(3):
        here = lin.at(X + k)
        J = jacobian(f, X + k)
        for i in range(6):
            torch.testing.assert_close(here.jvp_fn(V + i), J @ (V + i))
            torch.testing.assert_close(here.vjp_fn(V + i)[0], J.T @ (V + i))
    assert runs == 3
    assert lin.stats().compiled == 2  # the two directions
    assert backend.graphs == 2
    before = backend.runs
    here.jvp_fn(V)
    assert backend.runs == before + 1


class Root(Function):
    """The cube root by NumPy, in which every method counts its calls."""

    calls: ClassVar[list[str]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.from_numpy(np.cbrt(x.detach().numpy()))
        ctx.slope = 1 / (3 * y * y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        Root.calls.append("backward")
        return torch.from_numpy(grad.numpy() * ctx.slope.numpy())

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        Root.calls.append("jvp")
        return torch.from_numpy(tangent.numpy() * ctx.slope.numpy())


@pytest.mark.usefixtures("always_quicker")
def test_custom_functions_stay_calls() -> None:
    def cube_root(x: torch.Tensor) -> torch.Tensor:
        return x.sign() * x.abs() ** (1 / 3)

    def g(x: torch.Tensor, root: Any) -> torch.Tensor:
        return f(root(3 + f(x / 3))).roll(1) * root(x + 3)  # type: ignore[no-any-return]

    Root.calls = []
    backend = Backend()
    lin = lz.Linearizer(lambda x: g(x, Root.apply), compile={"backend": backend})
    J = jacobian(lambda x: g(x, cube_root), X)
    here = lin.at(X)
    for k in range(6):
        torch.testing.assert_close(here.jvp_fn(V + k), J @ (V + k))
        torch.testing.assert_close(here.vjp_fn(V + k)[0], J.T @ (V + k))
    assert Root.calls == ["jvp", "jvp", "backward", "backward"] * 6
    assert lin.stats().compiled == 2
    assert backend.graphs >= 2
    # What was compiled serves another point, with the contexts of that one.
    J = jacobian(lambda x: g(x, cube_root), X + 1)
    there, graphs, runs = lin.at(X + 1), backend.graphs, backend.runs
    for k in range(3):
        torch.testing.assert_close(there.jvp_fn(V + k), J @ (V + k))
        torch.testing.assert_close(there.vjp_fn(V + k)[0], J.T @ (V + k))
    assert Root.calls == ["jvp", "jvp", "backward", "backward"] * 9
    assert backend.graphs == graphs
    assert backend.runs > runs


@pytest.mark.usefixtures("always_quicker")
def test_a_compiler_that_fails_is_reported_once() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler here")

    lin = lz.Linearizer(f, compile={"backend": broken})
    here = lin.at(X)
    J = jacobian(f, X)
    for _ in range(3):
        here.jvp_fn(V)
    with pytest.warns(CompilationWarning, match=r"pushforward: torch\.compile failed.*no C\+\+ "):
        torch.testing.assert_close(here.jvp_fn(V), J @ V)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(4):
            torch.testing.assert_close(here.jvp_fn(V + k), J @ (V + k))
            torch.testing.assert_close(lin.at(X + 1).jvp_fn(V), jacobian(f, X + 1) @ V)
    assert lin.stats().compiled == 0


@pytest.mark.usefixtures("always_quicker")
def test_wrong_code_is_not_taken() -> None:
    here = lz.Linearizer(f, compile={"backend": Backend(lambda y: y * 1.001)}).at(X)
    for _ in range(3):
        here.jvp_fn(V)
    with pytest.warns(CompilationWarning, match="does not give the same"):
        here.jvp_fn(V)
    for k in range(4):
        torch.testing.assert_close(here.jvp_fn(V + k), jacobian(f, X) @ (V + k))


def test_what_saves_too_little_is_not_compiled() -> None:
    """A handful of operations between matrix products: the call of compiled code costs more."""
    backend = Backend()
    lin = lz.Linearizer(f, compile={"backend": backend})
    here = lin.at(X)
    for _ in range(4):
        here.jvp_fn(V)
    before = backend.runs
    torch.testing.assert_close(here.jvp_fn(V), jacobian(f, X) @ V)
    assert (backend.graphs, backend.runs, lin.stats().compiled) == (0, before, 0)


@pytest.mark.usefixtures("always_quicker")
def test_a_closure_that_has_settled_can_still_be_compiled() -> None:
    backend = Backend()
    here = lz.Linearizer(f, dense_limit=0).at(X)
    for _ in range(20):
        here.jvp_fn(V)
    (plan,) = here.jvp_fn._plans.values()
    assert plan.quiet
    assert here.jvp_fn._short is not None
    here.compile(backend=backend)
    assert here.jvp_fn._short is None
    for _ in range(3):
        torch.testing.assert_close(here.jvp_fn(V), jacobian(f, X) @ V)
    assert backend.graphs == 1
    assert backend.runs >= 2
    assert here.jvp_fn._short is None


@pytest.mark.usefixtures("always_quicker")
def test_every_kind_of_call_after_the_takeover() -> None:
    backend = Backend()
    w = W.clone()
    here = lz.Linearizer(lambda x, y: f(x) * (w @ y)).at(X, X)
    here.compile(backend=backend)
    for _ in range(3):
        here.jvp_fn(X, V)
        here.vjp_fn(V)
    assert backend.graphs == 2
    by_x, by_y = jacobian(lambda x, y: f(x) * (W @ y), (X, X))
    expected = by_x @ V + by_y @ X
    graphs = backend.graphs
    torch.testing.assert_close(here.jvp_fn(V, X), expected)
    torch.testing.assert_close(here.jvp_fn(V.repeat_interleave(2)[::2], X), expected)
    with torch.inference_mode():
        torch.testing.assert_close(here.jvp_fn(V * 1, X), expected)
    with torch.no_grad():
        torch.testing.assert_close(here.jvp_fn(V, X), expected)
    v = V.clone().requires_grad_()
    result = here.jvp_fn(v, X)
    torch.testing.assert_close(result.detach(), expected)
    torch.testing.assert_close(torch.autograd.grad(result, v, X)[0], by_x.T @ X)
    rows = torch.stack([V, X])
    torch.testing.assert_close(here.vjp_fn.batched(rows)[1], rows @ by_y)
    torch.testing.assert_close(torch.vmap(here.jvp_fn)(rows, rows), rows @ (by_x + by_y).T)
    assert backend.graphs == graphs  # never compiled anew for another stride or mode
    for _ in range(4):
        torch.testing.assert_close(here.jvp_fn(None, X), by_y @ X)
    first = here.jvp_fn(V, X)
    first.zero_()
    torch.testing.assert_close(here.jvp_fn(V, X), expected)
    w.mul_(2)
    with pytest.raises(StalenessError):
        here.jvp_fn(V, X)


def test_complex_programs_are_left_alone() -> None:
    backend = Backend()
    here = lz.Linearizer(lambda z: (z * z.conj()).roll(1) * z, compile={"backend": backend})
    z = torch.complex(X, V)
    point = here.at(z)
    for _ in range(6):
        point.jvp_fn(z)
    assert backend.graphs == 0


@pytest.mark.parametrize("option", ["inductor", 3])
def test_the_option(option: Any) -> None:
    with pytest.raises(OptionError, match="compile must be a bool or a dict"):
        lz.Linearizer(f, compile=option)


@pytest.mark.slow
def test_inductor() -> None:
    def long(x: torch.Tensor) -> torch.Tensor:
        for _ in range(10):
            x = x + 0.1 * (x.roll(1) - x.roll(-1)) * x
        return x

    x = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    state = torch.get_rng_state()
    lin = lz.Linearizer(long, compile=True, dense_limit=0)
    J = jacobian(long, x)
    for k in range(2):
        here = lin.at(x * (1 - k / 2))
        J = jacobian(long, x * (1 - k / 2))
        for _ in range(5):
            torch.testing.assert_close(here.jvp_fn(x.cos()), J @ x.cos())
            torch.testing.assert_close(here.vjp_fn(x.cos())[0], J.T @ x.cos())
    assert lin.stats().compiled == 2
    assert torch.equal(state, torch.get_rng_state())


# -- segments, and graphs on a device that is not there ----------------------------------------


class Halves(Operation):
    """An opaque operation that halves, or gives None, and notes that it was called."""

    may_alias = True

    def __init__(self, name: str, calls: list[str], nothing: bool = False) -> None:
        self.name, self.calls, self.nothing = name, calls, nothing

    def __call__(self, *args: torch.Tensor) -> Any:
        self.calls.append(self.name)
        return [None if self.nothing else args[0] / 2]


SPEC = TensorSpec((3,), torch.float64, torch.device("cpu"))


def program(calls: list[str], nothing: bool = False) -> Program:
    """(a + a)/2 + (3 a)/2 ... with two opaque calls, the second of which comes first."""
    a, b, c, d, e, g, h = (Var(SPEC) for _ in range(7))

    def eq(op: Any, args: Any, out: Var) -> Equation:
        return Equation(op, args, {}, (out,))

    return Program(
        [a],
        [
            eq(aten.add.Tensor, (a, a), b),
            eq(Halves("first", calls, nothing), (b,), c),  # c = a
            eq(aten.mul.Scalar, (c, 5.0), d),  # 5 a
            eq(Halves("second", calls), (d,), e),  # 2.5 a
            eq(aten.mul.Scalar, (a, 8.0), g),
            eq(Halves("third", calls), (g,), h),  # 4 a
        ],
        [e, h, a, d, None],
        [SPEC] * 5,
    )


def check(run: Any, factors: Any) -> None:
    for k in range(3):
        t = torch.tensor([1.0, -2.0, k], dtype=torch.float64)
        results = run(t)
        for got, factor in zip(results, factors, strict=True):
            expected = None if factor is None else factor * t
            torch.testing.assert_close(got, expected)
        assert len({r.data_ptr() for r in [*results[:4], t]}) == 5  # all are the caller's own


def test_a_program_in_segments() -> None:
    calls: list[str] = []
    whole = program(calls)
    executor = Executor(whole)
    segments = Segments(whole, executor.copies)
    binding = Binding((), whole.opaque())
    check(lambda t: segments([t], binding), [2.5, 4, 1, 5, None])
    assert sorted(calls) == sorted(["first", "second", "third"] * 3)
    # What needs no call before it is in one stretch.
    assert [isinstance(part, Stretch) for part in segments.parts] == [
        True,
        False,
        False,
        True,
        False,
    ]


def test_undefined_results_are_zero_in_segments() -> None:
    whole = program([], nothing=True)
    segments = Segments(whole, Executor(whole).copies)
    e, h, a, d, _ = segments([torch.ones(3, dtype=torch.float64)], Binding((), whole.opaque()))
    for t, value in ((e, 0), (h, 4), (a, 1), (d, 0)):
        assert t is not None
        assert t.tolist() == [value] * 3


class FakeGraph:
    """Runs a function again and writes what it gives over what it gave, as a graph does."""

    def __init__(self, function: Callable[[], Any], results: Any, log: list[str]) -> None:
        self.function, self.results, self.log = function, results, log

    def replay(self) -> None:
        self.log.append("replay")
        for mine, new in zip(self.results, self.function(), strict=True):
            mine.copy_(new)

    def begin(self) -> None:
        self.log.append("begin")

    def end(self, used: Any) -> None:
        self.log.append("end")


def test_stretches_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize._forms.cuda_graphs.GRAPH_FROM", 1)
    captures: list[FakeGraph] = []
    log: list[str] = []

    def capture(function: Callable[[], Any]) -> Any:
        results = [t.clone() for t in function()]
        captures.append(FakeGraph(function, results, log))
        return captures[-1], results

    calls: list[str] = []
    whole = program(calls)
    segments = Segments(whole, Executor(whole).copies)
    binding, replays = Binding((), whole.opaque()), Replays(capture, SPEC.device)
    check(lambda t: segments([t], binding, replays), [2.5, 4, 1, 5, None])
    assert len(captures) == 2
    assert log == ["begin", "replay", "end"] * 6
    assert sorted(calls) == sorted(["first", "second", "third"] * 3)


def test_what_cannot_be_captured_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize._forms.cuda_graphs.GRAPH_FROM", 1)

    def capture(function: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    whole = program([])
    segments = Segments(whole, Executor(whole).copies)
    binding, replays = Binding((), whole.opaque()), Replays(capture, SPEC.device)
    check(lambda t: segments([t], binding, replays), [2.5, 4, 1, 5, None])


def test_what_is_elsewhere_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize._forms.cuda_graphs.GRAPH_FROM", 1)
    whole = program([])
    segments = Segments(whole, Executor(whole).copies)
    replays = Replays(lambda _: pytest.fail("captured"), torch.device("meta"))
    check(lambda t: segments([t], Binding((), whole.opaque()), replays), [2.5, 4, 1, 5, None])


def test_short_stretches_are_not_captured() -> None:
    whole = program([])
    segments = Segments(whole, Executor(whole).copies)
    replays = Replays(lambda _: pytest.fail("captured"), SPEC.device)
    check(lambda t: segments([t], Binding((), whole.opaque()), replays), [2.5, 4, 1, 5, None])


def test_memory_is_let_go_after_a_compiler_failed() -> None:
    """`torch.compile` then still has a say in how frames run, which shows in reference counts."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("no")

    with pytest.raises(Exception, match="no"):
        torch.compile(lambda x: x.sin() + 1, backend=broken)(X)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            x = torch.sin(x) * 1.1 - 0.028
        return x

    here = lz.Linearizer(chain).at(X)
    for _ in range(4):
        here.jvp_fn(V)
        here.vjp_fn(V)
    assert here.nbytes <= 2 * X.nbytes
