"""A function at a point.

A function, primals and options come in; a `Linearization` goes out, with its two products, and
a memo keeps it. Open `linearizer` first.
"""
