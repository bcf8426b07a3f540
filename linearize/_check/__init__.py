"""The two directions are adjoint.

Two programs, or two maps, come in; nothing goes out, or an error that names the operation at
which they part. Open `adjoint` first.
"""
