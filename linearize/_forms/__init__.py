"""Other forms of a map, and when they take over.

A program and its executor come in; results of products go out, first from the program as it
was recorded, later from a smaller, stacked, dense, banded or compiled form. How programs are
simplified, transposed and checked is handed in. Open `plan` first.
"""
