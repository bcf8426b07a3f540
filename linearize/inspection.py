"""What a linearization keeps, what its products cost, and what they look like.

The objects here are made of numbers and names only: to hold one keeps no tensor alive, but for
a `ProgramPair`.
"""

from ._inspect.cost import Cost
from ._inspect.drawing import Drawing
from ._inspect.kept import KeptTensor, Residuals
from ._inspect.summary import Summary
from ._points.linearization import ProgramPair
from ._text.labels import Line

__all__ = ["Cost", "Drawing", "KeptTensor", "Line", "ProgramPair", "Residuals", "Summary"]


def __dir__() -> list[str]:
    return __all__
