"""What of PyTorch is private or not stable: nothing else in the package names it.

Nothing comes in but PyTorch itself; names with a settled meaning go out. Open `names` first.
"""
