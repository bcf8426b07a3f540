"""The other direction.

A linear program comes in; the program of its adjoint goes out. What an author left out, a `jvp`
or a `backward`, is derived from what is there. Open `transpose` first.
"""
