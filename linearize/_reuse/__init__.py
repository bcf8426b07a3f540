"""What points have in common.

The signature of a graph and its programs come in from one point; another point of the same
structure gets the programs, to be run with its own numbers. Open `structure` first.
"""
