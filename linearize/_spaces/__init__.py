"""Tensors and pytrees of them, the spaces they belong to, and operators between spaces.

What a user passes comes in; flat lists of tensors that are known to fit go out, and results in
the user's structure. Open `space` first.
"""
