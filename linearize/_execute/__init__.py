"""A program runs.

A program and its numbers come in; results go out, with intermediates released after their last
use. Open `executor` first.
"""
