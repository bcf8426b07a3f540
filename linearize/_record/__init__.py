"""The pullback is written down.

The autograd graph of one point comes in; the linear program of its backward pass goes out. Open
`pullback` first.
"""
