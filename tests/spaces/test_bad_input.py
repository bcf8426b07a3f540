"""Bad input: an error names argument, leaf, expected and received; the object stays usable."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import linearize as lz
from linearize.errors import ClosedError, OptionError, SpaceError, StructureError, UnsupportedError

Pair = namedtuple("Pair", "left right")


def nested(layout: torch.layout = torch.strided) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=layout)


def csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(3).to_sparse_csr()


def quantized(x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


@pytest.fixture
def here() -> lz.Linearization:
    """A point with nested primals and a nested value."""

    def f(d: Any, y: torch.Tensor) -> Any:
        return {"p": d["a"] * d["b"][0], "q": (y.sin(), d["n"] + 1)}

    d = {"a": torch.tensor([1.0, 2.0]), "b": [torch.tensor([3.0, 4.0])], "n": torch.tensor(5)}
    return lz.Linearizer(f).at(d, torch.zeros(3))


def still_works(here: lz.Linearization) -> None:
    out = here.jvp_fn({"a": torch.ones(2), "b": [None], "n": None}, torch.ones(3))
    assert out["p"].tolist() == [3, 4]
    assert out["q"][0].tolist() == [1, 1, 1]
    first, second = here.vjp_fn({"p": torch.ones(2), "q": (torch.ones(3), None)})
    assert first["b"][0].tolist() == [1, 2]
    assert second.tolist() == [1, 1, 1]


def good() -> dict[str, Any]:
    return {"a": torch.ones(2), "b": [torch.ones(2)], "n": None}


def with_(**changes: Any) -> dict[str, Any]:
    return {**good(), **changes}


Y = torch.ones(3)

TANGENTS: dict[str, tuple[tuple[Any, ...], type[Exception], list[str]]] = {
    "too few": ((good(),), StructureError, ["tangent", "expected 2", "got 1"]),
    "too many": ((good(), Y, Y), StructureError, ["tangent", "expected 2", "got 3"]),
    "none at all": ((), StructureError, ["tangent", "expected 2", "got 0"]),
    "a tensor for a dict": ((Y, Y), StructureError, ["tangent[0]", "dict", "float32[3]"]),
    "a tuple for a list": (
        (with_(b=(torch.ones(2),)), Y),
        StructureError,
        ["tangent[0]['b']", "list", "tuple"],
    ),
    "a longer list": (
        (with_(b=[torch.ones(2)] * 2), Y),
        StructureError,
        ["tangent[0]['b']", "expected 1", "got 2"],
    ),
    "a missing key": (
        ({"a": torch.ones(2), "n": None}, Y),
        StructureError,
        ["tangent[0]", "missing 'b'"],
    ),
    "an unknown key": ((with_(z=Y), Y), StructureError, ["tangent[0]", "unexpected 'z'"]),
    "a list for a leaf": (
        (with_(a=[1.0, 1.0]), Y),
        StructureError,
        ["tangent[0]['a']", "float32[2]", "list"],
    ),
    "a number for a leaf": (
        (with_(a=1.0), Y),
        StructureError,
        ["tangent[0]['a']", "float32[2]", "float 1.0"],
    ),
    "a tangent for an integer leaf": (
        (with_(n=torch.tensor(1)), Y),
        StructureError,
        ["tangent[0]['n']", "no tangent", "int64[]"],
    ),
    "a float tangent for an integer leaf": (
        (with_(n=torch.tensor(1.0)), Y),
        StructureError,
        ["tangent[0]['n']", "no tangent", "float32[]"],
    ),
    "shape": ((good(), torch.ones(4)), SpaceError, ["tangent[1]", "shape", "(3,)", "(4,)"]),
    "a shape that would broadcast": (
        (with_(b=[torch.ones(1)]), Y),
        SpaceError,
        ["tangent[0]['b'][0]", "float32[2]", "float32[1]"],
    ),
    "0-dim": ((good(), torch.ones(())), SpaceError, ["tangent[1]", "float32[3]", "float32[]"]),
    "dtype": (
        (good(), torch.ones(3, dtype=torch.float64)),
        SpaceError,
        ["tangent[1]", "dtype", "torch.float32", "torch.float64"],
    ),
    "integer tangent": (
        (good(), torch.ones(3, dtype=torch.int64)),
        SpaceError,
        ["tangent[1]", "torch.float32", "torch.int64"],
    ),
    "complex tangent": (
        (good(), torch.ones(3, dtype=torch.complex64)),
        SpaceError,
        ["tangent[1]", "torch.complex64"],
    ),
    "device": (
        (good(), torch.ones(3, device="meta")),
        SpaceError,
        ["tangent[1]", "device", "cpu", "meta"],
    ),
    "sparse": ((good(), Y.to_sparse()), SpaceError, ["tangent[1]", "layout", "sparse_coo"]),
    "nested": (
        (good(), nested()),
        lz.LinearizeError,
        ["tangent[1]", "nested"],
    ),
}


@pytest.mark.parametrize("name", TANGENTS)
def test_tangents(here: lz.Linearization, name: str) -> None:
    tangents, kind, words = TANGENTS[name]
    for _ in range(2):  # before and after the program was recorded
        with pytest.raises(kind) as caught:
            here.jvp_fn(*tangents)
        assert isinstance(caught.value, lz.LinearizeError)
        for word in words:
            assert word in str(caught.value)
        still_works(here)


U = (torch.ones(3), None)
COTANGENTS: dict[str, tuple[tuple[Any, ...], type[Exception], list[str]]] = {
    "two for one value": (
        ({"p": torch.ones(2), "q": U}, torch.ones(2)),
        StructureError,
        ["cotangent", "expected 1", "got 2"],
    ),
    "none": ((), StructureError, ["cotangent", "expected 1", "got 0"]),
    "a tensor for a dict": ((Y,), StructureError, ["cotangent", "dict", "float32[3]"]),
    "key": (({"p": Y, "r": U},), StructureError, ["cotangent", "missing 'q'", "unexpected 'r'"]),
    "inner length": (
        ({"p": torch.ones(2), "q": (Y,)},),
        StructureError,
        ["cotangent['q']", "expected 2", "got 1"],
    ),
    "integer leaf": (
        ({"p": torch.ones(2), "q": (Y, torch.tensor(1))},),
        StructureError,
        ["cotangent['q'][1]", "no cotangent"],
    ),
    "shape": (
        ({"p": torch.ones(2, 1), "q": U},),
        SpaceError,
        ["cotangent['p']", "(2,)", "(2, 1)"],
    ),
    "dtype": (
        ({"p": torch.ones(2).double(), "q": U},),
        SpaceError,
        ["cotangent['p']", "torch.float32", "torch.float64"],
    ),
    "device": (
        ({"p": torch.ones(2, device="meta"), "q": U},),
        SpaceError,
        ["cotangent['p']", "cpu", "meta"],
    ),
}


@pytest.mark.parametrize("name", COTANGENTS)
def test_cotangents(here: lz.Linearization, name: str) -> None:
    cotangents, kind, words = COTANGENTS[name]
    for _ in range(2):
        with pytest.raises(kind) as caught:
            here.vjp_fn(*cotangents)
        for word in words:
            assert word in str(caught.value)
        still_works(here)


def test_containers_of_another_type() -> None:
    other = namedtuple("other", "left right")
    here = lz.Linearizer(lambda p: p.left * p.right).at(Pair(torch.ones(2), torch.ones(2)))
    for wrong in ((Y, Y), other(torch.ones(2), torch.ones(2)), [Y, Y]):
        with pytest.raises(StructureError, match=r"tangent\[0\].*(Pair|namedtuple)"):
            here.jvp_fn(wrong)
    assert here.jvp_fn(Pair(torch.ones(2), None)).tolist() == [1, 1]


# -- primals ---------------------------------------------------------------------------------


def refuses(
    f: Callable[..., Any],
    args: tuple[Any, ...],
    kind: type[Exception],
    *words: str,
    **options: Any,
) -> None:
    """`at` must raise before f runs, and work afterwards at a good point."""
    runs = 0

    def counted(*a: Any) -> Any:
        nonlocal runs
        runs += 1
        return f(*a)

    lin = lz.Linearizer(counted, **options)
    for _ in range(2):
        with pytest.raises(kind) as caught:
            lin.at(*args)
        for word in words:
            assert word in str(caught.value)
    assert runs == 0
    assert lin.stats().points == 0


def test_no_differentiable_primal() -> None:
    refuses(lambda *a: a[0], (torch.tensor([1]),), StructureError, "primal[0]", "int64[1]")
    refuses(lambda *a: a[0], (3, "s"), StructureError, "primal[0]: int", "primal[1]: str")
    refuses(lambda *a: a[0], ({"k": torch.tensor(True)},), StructureError, "primal[0]['k']: bool")
    refuses(lambda *a: torch.ones(1), (), StructureError, "no arguments")
    refuses(lambda *a: a[0], ([],), StructureError, "no differentiable primal")
    refuses(lambda *a: a[0], ([1.0],), StructureError, "primal[0][0]: float", "torch.as_tensor")
    refuses(lambda *a: a[0], (np.ones(2),), StructureError, "ndarray", "torch.as_tensor")
    refuses(lambda *a: a[0], (torch.ones(2).int(),), StructureError, "int32[2]", ".double()")
    refuses(
        lambda x, n: x,
        (torch.ones(2), torch.tensor(1)),
        StructureError,
        "no differentiable primal",
        argnums=1,
    )


@pytest.mark.parametrize(
    ("primal", "words"),
    [
        (torch.ones(3).to_sparse(), ["sparse_coo"]),
        (csr(), ["sparse_csr"]),
        (nested(), ["nested"]),
        (nested(torch.jagged), ["nested"]),
        (quantized(torch.ones(3)), ["quantized"]),
        (torch.ones(3, device="meta"), ["meta"]),
    ],
    ids=["coo", "csr", "nested", "jagged", "quantized", "meta"],
)
def test_unsupported_primals(primal: torch.Tensor, words: list[str]) -> None:
    x = torch.ones(2)
    refuses(lambda d, x: x, ({"k": [primal]}, x), UnsupportedError, "primal[0]['k'][0]", *words)
    refuses(lambda d, x: x, ({"k": [primal]}, x), UnsupportedError, *words, match="value")


def test_a_sparse_argument_that_is_not_differentiated_is_fine() -> None:
    A = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    x = torch.ones(2)
    here = lz.Linearizer(lambda x, A: torch.mv(A, x), argnums=0).at(x, A.to_sparse())
    assert here.jvp_fn(torch.tensor([1.0, 0.0])).tolist() == [0, 3]
    assert here.vjp_fn(torch.tensor([1.0, 0.0]))[0].tolist() == [0, 2]


@pytest.mark.parametrize("argnums", [2, -3, (0, 5), (0, 0), (0, -2)])
def test_argnums_out_of_range_or_repeated(argnums: Any) -> None:
    args = (torch.ones(2), torch.ones(2))
    refuses(lambda a, b: a, args, StructureError, "argnums", argnums=argnums)


@pytest.mark.parametrize("argnums", [1.5, "x", [None]])
def test_argnums_of_another_kind(argnums: Any) -> None:
    with pytest.raises((lz.LinearizeError, TypeError), match="argnums"):
        lz.Linearizer(torch.sin, argnums=argnums).at(torch.ones(2))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"match": "equal"}, "match"),
        ({"opaque": "guess"}, "opaque"),
        ({"maxsize": -1}, "maxsize"),
        ({"max_bytes": -1}, "max_bytes"),
    ],
)
def test_options(options: Any, word: str) -> None:
    with pytest.raises(OptionError, match=word):
        lz.Linearizer(torch.sin, **options)


def test_f_must_be_callable() -> None:
    with pytest.raises(TypeError, match=r"f must be callable, got Tensor"):
        lz.Linearizer(torch.ones(2))


def test_errors_of_the_constructor_belong_to_the_family() -> None:
    """CONTRIBUTING.md: every error raised on purpose derives from `LinearizeError`."""
    for make in (lambda: lz.Linearizer(3), lambda: lz.Linearizer(torch.sin, match="equal")):
        with pytest.raises(lz.LinearizeError):
            make()


# -- what f returns ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, ["NoneType", "tensor"]),
        ("text", ["str", "tensor"]),
        ([], ["list", "tensor"]),
        (3, ["int", "tensor"]),
        (3.5, ["3.5", "tensor"]),
        ({"a": torch.ones(1), "b": 2.5}, ["output['b']", "2.5"]),
        ([torch.ones(1), 1j], ["output[1]", "1j"]),
    ],
)
def test_outputs_that_are_not_tensors(result: Any, words: list[str]) -> None:
    answers = [lambda x: result, torch.sin]
    lin = lz.Linearizer(lambda x: answers.pop(0)(x))
    x = torch.ones(2)
    with pytest.raises(StructureError) as caught:
        lin.at(x)
    for word in words:
        assert word in str(caught.value)
    assert lin.stats().points == 0
    torch.testing.assert_close(lin.at(x).jvp_fn(x), x.cos())


@pytest.mark.parametrize(
    ("f", "word"),
    [
        (lambda x: {"s": x.to_sparse()}, "sparse_coo"),
        (lambda x: {"s": torch.nested.as_nested_tensor([x, x[:1]])}, "nested"),
        (lambda x: {"s": quantized(x)}, "quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_unsupported_outputs(f: Any, word: str) -> None:
    with pytest.raises(UnsupportedError, match=r"output\['s'\].*" + word):
        lz.Linearizer(f).at(torch.ones(3))


def test_has_aux_needs_a_pair() -> None:
    for result in (torch.ones(2), [torch.ones(2), 1], (torch.ones(2), 1, 2)):
        with pytest.raises(StructureError, match=r"has_aux=True.*\(value, aux\)"):
            lz.Linearizer(lambda x, r=result: r, argnums=0, has_aux=True).at(torch.ones(2))


# -- f raises ----------------------------------------------------------------------------------


class OwnError(Exception):
    pass


def test_f_raising_half_way_is_the_users_own_exception() -> None:
    error = OwnError("half-way")
    fail = True

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        if fail:
            raise error
        return y

    lin = lz.Linearizer(f)
    x = torch.ones(2)
    for _ in range(2):
        with pytest.raises(OwnError) as caught:
            lin.at(x)
        assert caught.value is error
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
    assert lin.stats().points == 0
    fail = False
    torch.testing.assert_close(lin.at(x).jvp_fn(x), x.cos())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, StopIteration, RuntimeError])
def test_any_exception_leaves_no_mode_behind(error: type[BaseException]) -> None:
    fail = True

    def f(x: torch.Tensor) -> torch.Tensor:
        if fail:
            raise error
        return x**2

    lin = lz.Linearizer(f)
    x = torch.ones(2)
    with torch.no_grad():
        with pytest.raises(error):
            lin.at(x)
        assert not torch.is_grad_enabled()
        assert torch.overrides._get_current_function_mode() is None
    fail = False
    assert lin.at(x).jvp_fn(x).tolist() == [2, 2]


# -- closed ------------------------------------------------------------------------------------


def test_closed_points_say_so() -> None:
    x = torch.ones(2)
    here = lz.Linearizer(torch.sin).at(x)
    jvp_fn, vjp_fn = here.jvp_fn, here.vjp_fn
    here.close()
    here.close()  # twice is once
    assert here.closed
    calls: list[Callable[[], Any]] = [
        lambda: jvp_fn(x),
        lambda: vjp_fn(x),
        lambda: jvp_fn(x.double()),  # closed comes first: nothing else matters
        lambda: here.value,
        lambda: here.program,
        lambda: jvp_fn.program,
        lambda: here.__enter__(),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="closed"):
            call()


def test_aux_of_a_closed_point() -> None:
    """It must not look as if f had returned no aux."""
    here = lz.Linearizer(lambda x: (x, "aux"), has_aux=True).at(torch.ones(2))
    here.close()
    with pytest.raises(ClosedError):
        _ = here.aux


def test_backward_through_a_product_of_a_closed_point() -> None:
    v = torch.ones(2, requires_grad=True)
    here = lz.Linearizer(torch.sin).at(torch.ones(2))
    y = here.jvp_fn(v)
    here.close()
    with pytest.raises(ClosedError):
        y.sum().backward()


def test_inside_torch_func_transforms() -> None:
    """A point made of wrapped tensors could not be used outside: refuse, and say what to do."""
    lin = lz.Linearizer(torch.sin)
    x = torch.ones(3)
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.vmap(lambda x: lin.at(x).value)(x)
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.grad(lambda x: lin.at(x).value.sum())(x)
    torch.testing.assert_close(lin.at(x).jvp_fn(x), x.cos())
