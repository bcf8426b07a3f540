"""Linear programs, their constants, and what is known of ATen operations.

Equations come in, one after the other, from those who write a program down; everybody else
gets a `Program`. Open `program` first.
"""
