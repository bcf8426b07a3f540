"""f runs once.

A function and its primals come in; its value goes out, with the autograd graph behind it and
what the calls of custom Functions left. Open `capture` first.
"""
