"""What of PyTorch is private or not stable: nothing else in the package names it.

Everything that may change from one release to the next is reached through here, so that a new
release is met by editing one folder. Nothing comes in but PyTorch; names with a settled meaning
go out. Open `names` first.
"""
