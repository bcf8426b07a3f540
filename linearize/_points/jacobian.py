"""The Jacobian of a function at a point, as a linear operator."""

from __future__ import annotations

import functools

from .._spaces.flat import Parts, zeros
from .._spaces.operators import LinearOperator, SelfAdjoint
from .closures import JvpFn, VjpFn
from .product import Product


class Jacobian(LinearOperator):
    """The Jacobian of a function at a point: `here.jacobian`.

    A function of one primal has that primal's structure as `in_space`, one of several primals
    the tuple of them. It keeps the two products and nothing else of the linearization.

    Parameters
    ----------
    jvp_fn, vjp_fn
        The products of a linearization.

    Raises
    ------
    LinearizeError
        In products, what `jvp_fn` and `vjp_fn` raise.
    """

    def __init__(self, jvp_fn: JvpFn, vjp_fn: VjpFn) -> None:
        super().__init__(
            jvp_fn._arguments.unpacked(),
            jvp_fn._results,
            functools.partial(run, jvp_fn),
            functools.partial(run, vjp_fn),
            # Its transpose takes about as much, and may never be needed.
            peak=lambda: vjp_fn.program.peak_bytes(),
            name="Jacobian",
        )
        self._products = jvp_fn, vjp_fn

    def gram(self) -> LinearOperator:
        """Return Jᴴ·J. Both maps are one program, simplified together."""
        jvp_fn, vjp_fn = self._products
        product = jvp_fn._then(vjp_fn, "gram")
        return SelfAdjoint(
            self.in_space,
            functools.partial(run, product),
            peak=lambda: product.program.peak_bytes(),
            diagonal=self.squared_norms,
            name="Jacobian.gram()",
        )


def run(product: Product, parts: Parts, *, stacked: bool) -> Parts:
    """Apply a product to an element, or to several stacked ones in one pass."""
    if not stacked:
        return product._apply(parts)
    if len(parts[0]) == 0:
        return zeros(product._results, 0)
    return product._batched(parts, None)
