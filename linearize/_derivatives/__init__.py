"""Derivatives with history.

A function and primals that may require grad come in; values, products and whole matrices go out
that can be differentiated again. Open `history` first.
"""
