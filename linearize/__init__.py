"""Linearize a PyTorch function once at a point, and apply its Jacobian many times.

>>> import torch, linearize as lz
>>> here = lz.Linearizer(torch.sin).at(torch.zeros(2))
>>> here.jvp_fn(torch.ones(2))
tensor([1., 1.])
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from . import errors, inspection, operators
from ._capture.registered import register_jvp
from ._points.closures import JvpFn, VjpFn
from ._points.linearization import Linearization
from ._points.linearizer import Linearizer
from ._points.memo import Stats
from ._spaces.operators import BRIDGES, LinearOperator
from .errors import LinearizeError

__version__ = "0.1.0"

__all__ = [
    "JvpFn",
    "Linearization",
    "LinearizeError",
    "Linearizer",
    "Stats",
    "VjpFn",
    "errors",
    "inspection",
    "operators",
    "register_jvp",
]

#: Modules that are loaded when they are first asked for; some cannot do without SciPy.
_LATER = "cupy curvature distributed func functional implicit scipy solvers sparse testing".split()
_WITH_SCIPY = ("scipy", "sparse")

if TYPE_CHECKING:  # for a type checker, these are there from the beginning
    from . import cupy as cupy
    from . import curvature as curvature
    from . import distributed as distributed
    from . import func as func
    from . import functional as functional
    from . import implicit as implicit
    from . import scipy as scipy
    from . import solvers as solvers
    from . import sparse as sparse
    from . import testing as testing
else:

    def __getattr__(name: str) -> object:
        if name in _LATER:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _to_scipy(operator: LinearOperator, *, real: bool) -> object:
    return import_module(f"{__name__}.scipy").aslinearoperator(operator, real=real)


BRIDGES["scipy"] = _to_scipy


def __dir__() -> list[str]:
    # Whoever goes through all names, as `help` does, must not meet one that cannot be loaded.
    later = [name for name in _LATER if name not in _WITH_SCIPY or find_spec("scipy")]
    return ["__version__", *__all__, *later]
