"""The exception family: every error that the package raises on purpose.

Each class also derives from the built-in exception that a caller would expect
(`TypeError`, `ValueError`, `RuntimeError`), so code that catches those keeps working.
"""

__all__ = [
    "AdjointError",
    "CheckFailure",
    "ClosedError",
    "CompilationWarning",
    "CopyError",
    "DistributedError",
    "FunctionContractError",
    "IgnoredHookWarning",
    "IndependenceWarning",
    "LinearizeError",
    "MemoWarning",
    "MissingDerivativeError",
    "NotLinearError",
    "OptionError",
    "ReuseError",
    "SpaceError",
    "StalenessError",
    "StructureError",
    "UnsupportedError",
]


def __dir__() -> list[str]:
    return __all__


class LinearizeError(Exception):
    """Base class of every error raised by this package."""


class StructureError(LinearizeError, TypeError, RuntimeError):
    """A pytree does not have the structure, or a leaf not the kind, that is expected.

    Raised for a wrong number of tangents, a container of another type or length, a leaf
    that is no tensor, a tangent for a leaf that has none. Remedy: pass a pytree structured
    like the primals (tangents) or like the value (cotangents); `None` stands for zero.
    """


class OptionError(LinearizeError, ValueError, RuntimeError):
    """An option has a value that it cannot have.

    The message names the option and what it can be.
    """


class CopyError(LinearizeError, TypeError):
    """A linearization was to be copied or pickled, which cannot be done: it holds a graph.

    Remedy: linearize anew where it is needed.
    """


class SpaceError(LinearizeError, ValueError, RuntimeError):
    """A leaf has a shape, dtype or device other than its space's.

    Remedy: convert the leaf that the message names; nothing is cast or broadcast silently.
    """


class UnsupportedError(LinearizeError, RuntimeError):
    """An operation, layout or situation that cannot be linearized correctly here.

    The message names the operation and, where there is one, the way around it.
    """


class MissingDerivativeError(UnsupportedError):
    """A product needs a method that a custom Function lacks and that cannot be derived.

    Raised at the product that needs it; the other product still works. Remedy: give the
    Function that method, register one (`linearize.register_jvp`), or pass
    `opaque="materialize"`.
    """


class NotLinearError(LinearizeError, RuntimeError):
    """A derivative that must be a linear map is not one, or a function given as linear is not.

    The message names the operation or the Function at fault.
    """


class AdjointError(LinearizeError, RuntimeError):
    """A check found that the two products of a point are not adjoint: one of them is wrong.

    The message names the first operation or custom Function at which they part. Remedy: for a
    custom Function, correct its `jvp` or its `backward` (`linearize.testing.check_linearization`
    tells which); if they part on purpose, pass `check="structure"`, which calls no user code.
    """


class ReuseError(LinearizeError, RuntimeError):
    """Programs recorded at another point were found not to be those of this point.

    Two points with equal structure share their programs, and the first time that one is taken
    over it is held against the graph of the point. The message names the node at which they
    part. The programs are forgotten: the next product of the point records its own. Remedy:
    none is needed but a report, this is a mistake of the package.
    """


class IndependenceWarning(UserWarning):
    """A value does not depend on any primal, so that all of its derivatives are zero.

    Most often something was lost: f left PyTorch (NumPy, `.item()`), detached its argument, ran
    under `torch.no_grad()`, or reads a tensor from elsewhere in place of its argument. If it is
    meant so: `warnings.filterwarnings("ignore", category=IndependenceWarning)`.
    """


class CompilationWarning(UserWarning):
    """A program could not be compiled; it runs as it was, and is right.

    For instance because there is no C++ compiler, which Inductor needs on the CPU.
    """


class MemoWarning(UserWarning):
    """A function ran again at the same point, because the memo cannot remember it.

    Something that f can reach cannot be looked into: a function in C of a package that the memo
    does not know, an object that hides its state, an iterator. The message names it. Remedy: if
    it stays as it is, say so by `Linearizer(f, unseen="constant")`.
    """


class IgnoredHookWarning(UserWarning):
    """A function registers gradient hooks, which the products do not run.

    The products are those of the function as it was computed: a hook that changes gradients is
    not a part of it. Remedy: write what the hook does as a custom `torch.autograd.Function`, or
    filter the warning if the hook only looks.
    """


class FunctionContractError(LinearizeError, RuntimeError):
    """A custom Function's `jvp` or `backward` returned something that its contract forbids.

    For instance None for an output that has a tangent, a wrong number of results, or a
    result of another shape.
    """


class StalenessError(LinearizeError, RuntimeError):
    """A tensor that the products need was changed in place since the linearization.

    Remedy: linearize anew at the changed point, or change a copy.
    """


class ClosedError(LinearizeError, RuntimeError):
    """A linearization, or a closure of one, was used after it was closed.

    Remedy: use it inside its `with` block, or linearize anew.
    """


class DistributedError(LinearizeError, RuntimeError):
    """A rank of a distributed operator failed or cannot be reached; raised on every rank.

    The message names the rank and its error.
    """


class CheckFailure(LinearizeError, AssertionError):  # noqa: N818 - reads like AssertionError
    """`linearize.testing.check_linearization` found a product that is not right."""
