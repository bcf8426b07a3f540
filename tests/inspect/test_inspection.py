"""What a linearization shows of itself, against numbers and lines known beforehand."""

from __future__ import annotations

import gc
import html
import inspect
import itertools
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import draw_programs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import linearize as lz
from linearize._inspect.layout import layered
from tests.support.functions import F64, direction, point

HERE = Path(__file__).name


def line_of(f: Callable[..., Any], mark: str) -> int:
    """Return the number of the line of f's source that ends in `# mark`."""
    lines, start = inspect.getsourcelines(f)
    (number,) = (start + i for i, text in enumerate(lines) if text.rstrip().endswith(f"# {mark}"))
    return number


def lines_in(here: lz.Linearization) -> set[int]:
    """Return the numbers of all lines that the residuals name."""
    found = [line for t in here.residuals() for line in t.lines]
    assert all(Path(line.file).name == HERE for line in found)
    return {line.number for line in found}


def lines_of_operation(here: lz.Linearization, name: str) -> set[int]:
    """Return the lines of the equations of a node, from the printed pullback."""
    found = re.findall(rf"# {name} \({re.escape(HERE)}:(\d+)\)", str(here.vjp_fn.program))
    return set(map(int, found))


def inner(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x)  # inner


class Cube(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


# -- residuals --------------------------------------------------------------------------------


def test_residuals_have_the_sizes_that_the_formulas_need() -> None:
    def f(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * a

    here = lz.Linearizer(f).at(point(7), point(7, seed=2))
    before = here.residuals()
    # The graph saves x and a, which are primals, and sin x.
    assert sorted((t.nbytes, t.note) for t in before) == [(0, "primal"), (0, "primal"), (56, "")]
    assert before.nbytes == 56 == here.nbytes
    assert {k for t in before for k in t.keepers} == {"graph"}
    here.program  # noqa: B018 (records both)
    # a; sin x and cos x.
    after = here.residuals()
    assert [t.nbytes for t in after] == [56, 56, 0]
    assert after.nbytes == 112 == here.nbytes
    assert {t.operations for t in after} == {("MulBackward0",), ("SinBackward0",)}
    assert all(t.keepers == ("jvp_fn", "vjp_fn") for t in after)
    assert all((t.shape, t.dtype, t.device.type) == ((7,), F64, "cpu") for t in after)
    assert after.by_operation() == {"MulBackward0": 56, "SinBackward0": 56}
    assert after.by_line() == {"(line not known)": 112}
    assert "trace=True" in str(after)


@pytest.mark.parametrize("custom", [False, True])
def test_their_bytes_are_those_of_the_linearization_at_every_stage(custom: bool) -> None:
    weight = point(12).reshape(4, 3)

    def f(x: torch.Tensor, y: torch.Tensor) -> Any:
        h = torch.tanh(weight @ (Cube.apply(x) if custom else x**3))
        return h * y.sum(), h[1:] * h[:-1]

    lin = lz.Linearizer(f)
    for seed in range(3):  # the second point takes the programs of the first over
        x, y = point(3, seed=seed), point(5, seed=seed + 9)
        here = lin.at(x, y)
        assert here.residuals().nbytes == here.nbytes > 0
        for k in range(4):
            here.jvp_fn(direction(x, k), None)
            assert here.residuals().nbytes == here.nbytes
            here.vjp_fn((direction(point(4), k), None))
            here.jvp_fn(direction(x, k), direction(y, k))
            assert here.residuals().nbytes == here.nbytes
            here.vjp_fn.batched((torch.eye(4, dtype=F64), None))
            assert here.residuals().nbytes == here.nbytes
    assert custom or lin.stats().reused == 2


def test_memory_that_is_shared_counts_once() -> None:
    table = point(40)

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * table[:4] + (x * table[4:8]) ** 2

    here = lz.Linearizer(f).at(point(4))
    here.program  # noqa: B018
    notes = [t.note for t in here.residuals() if t.nbytes == 0]
    assert "shared" in notes  # two parts of one table, which is kept as a whole
    assert 320 in [t.nbytes for t in here.residuals()]


def test_nothing_is_recorded_by_looking_at_residuals() -> None:
    here = lz.Linearizer(torch.sin).at(point())
    here.residuals()
    here._repr_html_()
    assert here.vjp_fn._program is None
    assert here.jvp_fn._program is None


def test_what_is_shown_keeps_nothing_alive(tmp_path: Path) -> None:
    lin = lz.Linearizer(lambda x: torch.sin(x) * torch.exp(x), trace=True)
    here = lin.at(point())
    seen = [here.residuals(), here.summary(), here.program.draw(), here.report(tmp_path / "r")]
    refs = [weakref.ref(r.tensor) for r in here.vjp_fn.program.residuals()]
    assert refs
    assert all(r() is not None for r in refs)
    del here
    lin.clear()
    gc.collect()
    assert all(r() is None for r in refs)
    assert len(seen) == 4


# -- lines of f -------------------------------------------------------------------------------


def test_lines_are_the_innermost_of_the_user() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = inner(x)
        y = torch.nn.functional.softplus(y)  # softplus
        z = Cube.apply(y)  # cube
        return torch.cosine_similarity(z, x, dim=0) * x  # last

    here = lz.Linearizer(f, trace=True).at(point())
    expected = {line_of(inner, "inner")} | {line_of(f, m) for m in ("softplus", "cube", "last")}
    assert lines_in(here) == expected
    here.program  # noqa: B018
    assert lines_in(here) == expected
    assert lines_of_operation(here, "ExpBackward0") == {line_of(inner, "inner")}
    assert lines_of_operation(here, "SoftplusBackward0") == {line_of(f, "softplus")}
    at_exp = [n for t in here.residuals() if "ExpBackward0" in t.operations for n in t.lines]
    assert ("return torch.exp(x)  # inner", "inner") in {(n.text, n.function) for n in at_exp}
    bytes_at = here.residuals().by_line()
    assert sum(bytes_at.values()) == here.nbytes
    assert "line not known" not in str(here.residuals())


def test_the_products_are_those_without_trace() -> None:
    runs = 0

    def f(x: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return torch.sin(Cube.apply(x)).cumsum(0) * x

    x, v = point(), direction(point())
    traced = lz.Linearizer(f, trace=True).at(x)
    plain = lz.Linearizer(f).at(x)
    assert torch.equal(traced.value, plain.value)
    for k in range(5):
        v = direction(x, k)
        torch.testing.assert_close(traced.jvp_fn(v), plain.jvp_fn(v))
        torch.testing.assert_close(traced.vjp_fn(v), plain.vjp_fn(v))
    assert runs == 2


def test_without_trace_nothing_is_noted() -> None:
    metadata: list[Any] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.sin(x)
        metadata.append(y.grad_fn.metadata)  # type: ignore[union-attr]
        assert torch._C._len_torch_function_stack() == 0
        return y

    here = lz.Linearizer(f, maxsize=0).at(point())
    assert metadata == [{}]
    assert here.residuals().traced is False
    assert str(here.vjp_fn.program).count(HERE) == 0


def test_simplified_programs_know_the_lines_that_were_folded() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x = torch.sin(x)  # one
        x = torch.exp(x)  # two
        return x * 3.0

    here = lz.Linearizer(f, trace=True).at(point())
    for k in range(5):
        here.vjp_fn(direction(point(), k))
        here.jvp_fn(direction(point(), k))
    assert len(here.vjp_fn.program.equations) == 1
    folded = [t for t in here.residuals() if "folded diagonals" in t.operations]
    assert {n.number for t in folded for n in t.lines} >= {line_of(f, "one"), line_of(f, "two")}


def test_in_place_operations_and_views() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(6, dtype=F64)
        y[:3] = x[:3].sin()  # set
        y[3:].copy_(x[3:].exp())  # copy
        y.mul_(x)  # mul
        return y

    here = lz.Linearizer(f, trace=True).at(point())
    assert lines_of_operation(here, "SinBackward0") == {line_of(f, "set")}
    assert lines_of_operation(here, "ExpBackward0") == {line_of(f, "copy")}
    assert lines_of_operation(here, "MulBackward0") == {line_of(f, "mul")}
    assert lines_of_operation(here, "torch::autograd::CopySlices") == {
        line_of(f, "set"),
        line_of(f, "copy"),
    }
    assert lines_in(here) <= {line_of(f, m) for m in ("set", "copy", "mul")}


def test_tracing_does_not_disturb_f_or_the_memo() -> None:
    kept: dict[str, torch.Tensor] = {}
    runs = 0

    def f(x: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        base = x * 2
        with torch.no_grad():
            view = base[1:]  # must not be used by autograd once its base has changed
        base.mul_(x)
        torch._foreach_mul_([base], 2.0)
        kept["made"] = base * 3  # made by f and not read by it
        del view
        return base.sin()

    lin = lz.Linearizer(f, trace=True)
    x = point()
    here = lin.at(x)
    kept["made"].data.zero_()
    kept["made"].detach().add_(1)
    assert lin.at(x) is here
    assert runs == 1
    for k in range(4):
        v = direction(x, k)
        torch.testing.assert_close(here.jvp_fn(v), torch.cos(4 * x * x) * 8 * x * v)
        torch.testing.assert_close(here.vjp_fn(v)[0], torch.cos(4 * x * x) * 8 * x * v)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_inside_f(device: str) -> None:
    """On a GPU other threads make the gradient's nodes."""

    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.sin(x) * x.sum()  # forward
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)  # gradient
        return torch.tanh(g)  # after

    here = lz.Linearizer(f, trace=True).at(point().to(device))
    assert lines_of_operation(here, "TanhBackward0") == {line_of(f, "after")}
    assert lines_of_operation(here, "CosBackward0") == {line_of(f, "gradient")}
    expected = {line_of(f, m) for m in ("forward", "gradient", "after")}
    assert line_of(f, "gradient") in lines_in(here) <= expected


def test_transforms_inside_f() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        def energy(z: torch.Tensor) -> torch.Tensor:
            return (torch.sin(z) ** 3).sum()  # energy

        force = torch.func.grad(energy)(x)  # grad
        rows = torch.func.vmap(lambda a: a.exp() * force.sum())(x)  # vmap
        _, tangent = torch.func.jvp(torch.tanh, (x,), (rows,))  # jvp
        return force * tangent  # last

    here = lz.Linearizer(f, trace=True).at(point())
    marks = {m: line_of(f, m) for m in ("energy", "grad", "vmap", "jvp", "last")}
    known = lines_in(here)
    assert known <= set(marks.values())
    assert {marks["energy"], marks["vmap"], marks["last"]} <= known
    assert lines_of_operation(here, "ExpBackward0") == {marks["vmap"]}
    assert lines_of_operation(here, "TanhBackward0") <= {marks["jvp"]}
    # Nothing was made out of sight.
    here.program  # noqa: B018
    assert "(line not known)" not in here.residuals().by_line()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * torch.exp(x)  # block

    def f(x: torch.Tensor) -> torch.Tensor:
        y = checkpoint(block, x, use_reentrant=reentrant)  # checkpoint
        return y * x  # after

    here = lz.Linearizer(f, trace=True).at(point())
    for k in range(4):
        v = direction(point(), k)
        torch.testing.assert_close(here.jvp_fn(v), lz.Linearizer(f).at(point()).jvp_fn(v))
    assert lines_in(here) == {line_of(block, "block"), line_of(f, "after")}


def test_threads_do_not_mix() -> None:
    def f(x: torch.Tensor, wait: Callable[[], object]) -> torch.Tensor:
        for _ in range(20):
            wait()
            x = torch.sin(x)  # sin
        return x

    def g(x: torch.Tensor, wait: Callable[[], object]) -> torch.Tensor:
        for _ in range(20):
            wait()
            x = torch.exp(-x) + torch.tanh(x)  # exp
        return x

    barrier = threading.Barrier(2, timeout=60)
    found: dict[Any, set[int]] = {}

    def work(fn: Callable[..., Any]) -> None:
        here = lz.Linearizer(lambda x: fn(x, barrier.wait), trace=True).at(point())
        found[fn] = lines_in(here)

    threads = [threading.Thread(target=work, args=(fn,)) for fn in (f, g)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == {f: {line_of(f, "sin")}, g: {line_of(g, "exp")}}


def test_what_other_threads_make_has_no_line_rather_than_a_wrong_one() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        made = []

        def work() -> None:
            with torch.enable_grad():
                y = x
                for _ in range(30):  # the thread's numbers run beside ours
                    y = torch.cos(y)  # elsewhere
                made.append(y)

        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(30):
            x = torch.sin(x)  # here
        thread.join()
        return made[0] * x  # product

    here = lz.Linearizer(f, trace=True).at(point())
    assert lines_of_operation(here, "CosBackward0") == set()
    assert lines_of_operation(here, "SinBackward0") == {line_of(f, "here")}
    by_line = here.residuals().by_line()
    assert by_line["(line not known)"] > 0


def test_points_share_programs_only_where_the_lines_agree() -> None:
    def f(x: torch.Tensor, other: bool) -> torch.Tensor:
        if other:
            return torch.sin(x)  # first
        return torch.sin(x)  # second

    lin = lz.Linearizer(f, argnums=0, trace=True)
    for seed, other in enumerate([True, True, False, False]):
        here = lin.at(point(seed=seed), other)
        here.vjp_fn(point())
        here.jvp_fn(point())
        assert lines_in(here) == {line_of(f, "first" if other else "second")}
    assert (lin.stats().recorded, lin.stats().reused) == (2, 2)


def test_a_deep_graph_is_traced_and_dies_in_peace() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(50_000):
            x = -x
        raise KeyError("in the middle of f")

    with pytest.raises(KeyError):  # PyTorch would overflow the stack here
        lz.Linearizer(f, trace=True).at(point())


def test_messages_name_the_line() -> None:
    weight = point()

    class Opaque(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(g.numpy() * 1.0)

    def f(x: torch.Tensor) -> torch.Tensor:
        y = Opaque.apply(x)  # opaque
        return y * weight  # scaled

    here = lz.Linearizer(f, trace=True).at(point())
    with pytest.raises(lz.errors.MissingDerivativeError, match=rf"{HERE}:{line_of(f, 'opaque')}"):
        here.jvp_fn(point())
    here.vjp_fn(point())
    weight.add_(1.0)
    with pytest.raises(lz.errors.StalenessError, match=rf"{HERE}:{line_of(f, 'scaled')}"):
        here.vjp_fn(point())


# -- costs ------------------------------------------------------------------------------------


def test_flops_are_those_that_pytorch_counts() -> None:
    image, kernel = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    matrix, vector = torch.randn(36, 11), torch.randn(11)

    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.conv2d(x, kernel)
        return torch.mv(y.reshape(8, 36) @ matrix, vector)

    here = lz.Linearizer(f, simplify=False).at(image)
    costs = here.summary().costs
    for direction_, run in (
        ("pushforward", lambda: here.jvp_fn(image)),
        ("pullback", lambda: here.vjp_fn(torch.randn(8))),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        # 8 inner products of length 11, or an outer product of 8 × 11, which it does not count.
        vectors = 2 * 8 * 11 if direction_ == "pushforward" else None
        extra = costs[direction_].flops - counter.get_total_flops()
        assert counter.get_total_flops() > 10_000
        assert extra == vectors if vectors else 0 < extra <= 2 * 8 * 11


def test_a_chain_costs_what_can_be_counted_by_hand() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(torch.sin(x)).reshape(5, 2).T

    here = lz.Linearizer(f).at(point(10))
    summary = here.summary()
    for c in summary.costs.values():
        assert (c.flops, c.calls, c.peak) == (20, 0, 160)
        # Two products: each reads two operands and writes one. A copy reads and writes one.
        assert c.traffic == 2 * 3 * 80 + 2 * 80 * c.operations.get("clone", 0)
        assert c.operations["mul"] == 2
    assert summary.operations.keys() == {"pushforward", "pullback"}
    text = str(summary)
    assert re.search(r"^mul +2 +2$", text, re.MULTILINE)
    assert "160 B" in text


def test_calls_of_custom_functions_are_counted_apart() -> None:
    summary = lz.Linearizer(lambda x: Cube.apply(Cube.apply(x))).at(point()).summary()
    assert {k: (c.calls, c.flops) for k, c in summary.costs.items()} == {
        "pushforward": (2, 0),
        "pullback": (2, 0),
    }
    assert summary.operations == {
        "pushforward": {"Cube.jvp": 2},
        "pullback": {"Cube.backward": 2},
    }


def test_a_product_that_cannot_be_had_is_said_so(tmp_path: Path) -> None:
    here = lz.Linearizer(lambda x: torch.special.zeta(x + 2, x)).at(point())
    with pytest.raises(lz.LinearizeError) as caught:
        here.vjp_fn(point())
    costs = here.summary().costs
    assert costs["pullback"] == str(caught.value)
    page = here.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert html.escape(str(caught.value)) in page


# -- drawings ---------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [t.text or "" for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_a_drawing_has_a_box_for_each_equation(tmp_path: Path) -> None:
    def f(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * a  # both

    here = lz.Linearizer(f, trace=True).at(point(3), point(3))
    svg = here.program.draw().save(tmp_path / "d.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(svg)
    kinds = [r.get("class") for r in root.iter(f"{SVG}rect")]
    # mul, mul, mul, add and mul, mul, mul; two inputs and a result, an input and two results
    assert kinds.count("lz-built") == 7
    assert kinds.count("lz-end") == 6
    edges = [p for p in root.iter(f"{SVG}path") if p.get("class") == "lz-edge"]
    assert len(edges) == 6 + 5
    found = texts(svg)
    assert found.count("mul") == 6
    assert found.count("add") == 1
    assert f"{HERE}:{line_of(f, 'both')}" in found
    assert "keeps 24 B" in found
    assert "4 equations, 72 B kept" in found


def test_the_picture_in_the_documentation_is_what_is_drawn() -> None:
    assert draw_programs.TARGET.read_text(encoding="utf-8") == f"{draw_programs.drawing()}\n"


def test_a_long_program_is_cut_off_readably() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(300):
            x = torch.sin(x)
        return x

    pair = lz.Linearizer(f).at(point()).program
    drawing = pair.draw(limit=10)
    found = texts(str(drawing))
    assert found.count("… 290 more equations …") == 2
    assert found.count("mul") == 2 * 10 + 2  # and one in the list of the hidden ones, twice
    assert found.count("keep 13.9 kB") == 2
    assert drawing._repr_svg_() == drawing.svg
    with pytest.raises(ElementTree.ParseError):
        ElementTree.fromstring(drawing.svg[:-3])


def test_many_inputs_are_put_together() -> None:
    def f(*xs: torch.Tensor) -> torch.Tensor:
        return torch.stack(xs).sum(0)

    pair = lz.Linearizer(f).at(*(point(2) for _ in range(40))).program
    found = texts(str(pair.draw()))
    assert "26 inputs" in found  # those whose readers are left out
    assert any(re.fullmatch(r"\d+ results", t) for t in found)


def test_names_of_all_kinds_are_escaped(tmp_path: Path) -> None:
    odd = type('A<b>&"\x1b', (Cube,), {})
    here = lz.Linearizer(lambda x: odd.apply(x)).at(point())
    for svg in (str(here.program.draw()), here.program._repr_html_()):
        found = [t.text for t in ElementTree.fromstring(svg).iter() if t.tag.endswith("text")]
        assert any('A<b>&"' in (t or "") for t in found)
    assert "<b>" not in here._repr_html_()
    here.report(tmp_path / "r.html")


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[tuple[float, float]], list[tuple[int, int]]]:
    n = draw(st.integers(1, 14))
    sizes = [(draw(st.floats(20, 200)), draw(st.floats(20, 90))) for _ in range(n)]
    pairs = list(itertools.combinations(range(n), 2))
    edges = draw(st.lists(st.sampled_from(pairs), max_size=25, unique=True)) if pairs else []
    return sizes, edges


def along(points: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield points of a route: straight and bent pieces take turns."""
    for i, ((x, y), (u, v)) in enumerate(itertools.pairwise(points)):
        for k in range(21):
            s = k / 20
            smooth = s if i % 2 == 0 else 3 * s**2 - 2 * s**3
            yield x + (u - x) * smooth, y + (v - y) * s


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_boxes_do_not_overlap_and_edges_pass_between_them(graph: Any) -> None:
    sizes, edges = graph
    layout = layered(sizes, edges)
    boxes = [
        (x - w / 2, x + w / 2, y - h / 2, y + h / 2)
        for (x, y), (w, h) in zip(layout.centres, sizes, strict=True)
    ]
    eps = 1e-6
    for a, b in itertools.combinations(boxes, 2):
        apart = a[1] + 8 < b[0] or b[1] + 8 < a[0] or a[3] + 8 < b[2] or b[3] + 8 < a[2]
        assert apart
    for left, right, top, bottom in boxes:
        assert -eps <= left
        assert right <= layout.width + eps
        assert -eps <= top
        assert bottom <= layout.height + eps
    assert len(layout.routes) == len(edges)
    for (a, b), route in zip(edges, layout.routes, strict=True):
        assert boxes[a][3] < boxes[b][2]  # downwards
        assert route[0] == pytest.approx((layout.centres[a][0], boxes[a][3]))
        assert route[-1] == pytest.approx((layout.centres[b][0], boxes[b][2]))
        for x, y in along(route):
            for left, right, top, bottom in boxes:
                assert not (left + eps < x < right - eps and top + eps < y < bottom - eps)


# -- pages ------------------------------------------------------------------------------------


class Balanced(HTMLParser):
    """Checks that tags are closed in order, and collects text and attributes."""

    void = frozenset({"meta", "br", "rect", "path"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def assert_needs_nothing_else(page: str) -> None:
    parsed = Balanced(page)
    assert not {k for k, _ in parsed.attributes} & {"src", "href", "srcset", "data", "action"}
    assert set(re.findall(r"https?://[^\s\"']*", page)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|<script|<link|javascript:", page)


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    weight = point(12).reshape(4, 3)
    lin = lz.Linearizer(lambda x: torch.tanh(weight @ Cube.apply(x)), trace=True)
    here = lin.at(point(3))
    path = here.report(tmp_path / "report.html")
    page = path.read_text(encoding="utf-8")
    assert_needs_nothing_else(page)
    words = "".join(Balanced(page).words)
    assert "<lambda>" in words  # as text, and not as a tag
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 4  # two programs, before and after simplification
    assert f"{HERE}:" in words
    assert str(here.program.pullback).splitlines()[0] in words
    assert "after fold_diagonals" in words
    for t in here.residuals():
        assert f"{t.nbytes:,} B" in words
        assert str(t) in words
    # A bar for each line, as long as its bytes.
    sizes = here.residuals().by_line()
    widths = [float(w) for w in re.findall(r'class="lz-bar" style="width:([\d.]+)%', page)]
    expected = [100 * n / max(sizes.values()) for n in sizes.values()]
    assert widths[: len(sizes)] == pytest.approx(expected, abs=0.06)


def test_notebooks_get_html() -> None:
    here = lz.Linearizer(lambda x: torch.sin(x) * 2, trace=True).at(point())
    pair = here.program
    shown = [here, pair, pair.pullback, here.residuals(), here.summary()]
    for thing in shown:
        assert_needs_nothing_else(thing._repr_html_())  # type: ignore[attr-defined]
    assert "&lt;lambda&gt;" in here._repr_html_()
    here.close()
    assert "closed" in here._repr_html_()


def test_a_closed_point_shows_nothing(tmp_path: Path) -> None:
    here = lz.Linearizer(torch.sin).at(point())
    here.close()
    for look in (here.residuals, here.summary, lambda: here.report(tmp_path / "r.html")):
        with pytest.raises(lz.errors.ClosedError):
            look()
    assert not (tmp_path / "r.html").exists()


def test_long_tables_are_cut_off_and_whole_ones_can_be_had() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(120):
            x = torch.sin(x)
        return x

    here = lz.Linearizer(f, trace=True).at(point())
    kept = here.residuals()
    assert len(kept) == 120  # the last is not needed, the first is the primal
    assert "70 more" in str(kept)
    assert len(kept.table(limit=None)[1]) == 120
    assert kept[0].nbytes == 48
    assert len(kept[:3]) == 3
