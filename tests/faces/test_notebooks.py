"""Functions that are typed in: cells, code from strings and from standard input, redefinitions."""

import code
import contextlib
import io
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: What is typed, in pieces; each piece ends in a check.
CELLS = (
    """
    import torch
    import linearize as lz
    x = torch.tensor([0.5, 1.5, -1.0], dtype=torch.float64)
    v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    scale, runs = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64), 0
    """,
    """
    def f(x):
        global runs
        runs += 1
        return torch.sin(scale * x)
    lin = lz.Linearizer(f)
    """,
    """
    for _ in range(5):
        assert torch.allclose(lin.at(x).jvp_fn(v), scale * torch.cos(scale * x) * v)
    assert runs == 1, runs
    """,
    # A name means something else from here on: f reads it by name.
    """
    scale = scale / 2
    for _ in range(5):
        assert torch.allclose(lin.at(x).jvp_fn(v), scale * torch.cos(scale * x) * v)
    assert runs == 2, runs
    """,
    # In place.
    """
    scale *= 3
    for _ in range(5):
        assert torch.allclose(lin.at(x).vjp_fn(v)[0], scale * torch.cos(scale * x) * v)
    assert runs == 3, runs
    """,
    # The same name and text of a function, another constant; then another function.
    """
    first = lin
    def f(x):
        global runs
        runs += 1
        return torch.cos(scale * x)
    lin, runs = lz.Linearizer(f), 0
    for _ in range(5):
        assert torch.allclose(lin.at(x).jvp_fn(v), -scale * torch.sin(scale * x) * v)
    assert runs == 1, runs
    """,
    """
    assert torch.allclose(first.at(x).jvp_fn(v), scale * torch.cos(scale * x) * v)
    """,
    # A function that f calls is typed again.
    """
    def g(x):
        return x ** 2
    """,
    """
    def h(x):
        return g(x) * scale
    lin = lz.Linearizer(h)
    assert torch.allclose(lin.at(x).jvp_fn(v), 2 * x * scale * v)
    """,
    """
    def g(x):
        return x ** 3
    """,
    """
    for _ in range(5):
        assert torch.allclose(lin.at(x).jvp_fn(v), 3 * x ** 2 * scale * v)
    """,
    # A custom Function, and the same one mended.
    """
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.x = x.numpy().copy()
            return torch.from_numpy(ctx.x ** 2)
        @staticmethod
        def backward(ctx, u):
            return torch.from_numpy(3 * ctx.x) * u  # wrong
        @staticmethod
        def jvp(ctx, v):
            return torch.from_numpy(2 * ctx.x) * v
    """,
    """
    lin = lz.Linearizer(lambda x: Square.apply(x))
    try:
        lin.at(x).check()
    except lz.errors.AdjointError as error:
        assert "Square" in str(error)
    else:
        raise AssertionError
    """,
    """
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.x = x.numpy().copy()
            return torch.from_numpy(ctx.x ** 2)
        @staticmethod
        def backward(ctx, u):
            return torch.from_numpy(2 * ctx.x) * u
        @staticmethod
        def jvp(ctx, v):
            return torch.from_numpy(2 * ctx.x) * v
    """,
    """
    for _ in range(5):
        assert torch.allclose(lin.at(x).jvp_fn(v), 2 * x * v)
        assert torch.allclose(lin.at(x).vjp_fn(v)[0], 2 * x * v)
    """,
    # What a notebook shows.
    """
    here = lz.Linearizer(f, trace=True).at(x)
    for shown in (here, here.residuals(), here.summary(), here.program):
        assert "<" in shown._repr_html_() and repr(shown)
    for shown in (lin, here.jvp_fn, here.jacobian, here.in_space, here.program.draw()):
        assert repr(shown)
    assert here.program.explain()
    p = lz.scipy.VectorFunction(f, [1.0, 2.0, 3.0])
    assert "f" in repr(p)
    """,
)
TYPED = [textwrap.dedent(cell).strip("\n") for cell in CELLS]


def test_an_interactive_interpreter():
    errors = io.StringIO()
    console = code.InteractiveConsole()
    with contextlib.redirect_stderr(errors):
        for cell in TYPED:
            for line in cell.splitlines():
                # A line that ends a block is empty, as it is at the prompt.
                if line[:1] not in (" ", "") and not line.startswith(("except", "else")):
                    console.push("")
                console.push(line)
            console.push("")
    assert not errors.getvalue()
    assert console.locals["lin"].stats().points == 1


def test_code_from_strings():
    names = {"__name__": "__main__"}
    for cell in TYPED:
        exec(cell, names)


def test_code_from_standard_input():
    done = subprocess.run(
        [sys.executable, "-"],
        input="\n\n".join(TYPED),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_cells_of_ipython():
    shells = pytest.importorskip("IPython.core.interactiveshell")
    shell = shells.InteractiveShell.instance()
    for cell in TYPED:
        result = shell.run_cell(cell)
        result.raise_error()
    shells.InteractiveShell.clear_instance()
