"""When another form of a map takes over: all thresholds, in one table.

They are counts (products asked for, operations, bytes) and shares of prices on paper, see
`_programs.price`. No clock decides: two runs of one script give the same bits.
"""

from __future__ import annotations

from typing import Final

# -- by PyTorch's engine ---------------------------------------------------------------------

#: How many of the first pullbacks of a point the engine runs over the graph, before the programs
#: of an earlier point are looked for and get the numbers of this one: that costs as much.
BY_ENGINE: Final = 3

# -- written out as a function ---------------------------------------------------------------

#: At which run a program is written out: one that is to be simplified before that, and others.
WRITE_OUT_AT: Final = 3
WRITE_OUT_SOON: Final = 1
#: At which point the computation of a structure's numbers is written out.
WRITE_OUT_NUMBERS_AT: Final = 3

# -- simplified ------------------------------------------------------------------------------

#: At which product a program is simplified: sooner would cost more than it saves.
SIMPLIFY_AT: Final = 3
#: At which product of a new point a simplified program takes over, at the soonest, whose
#: numbers cost as much to compute as several products. Half of those that repay it in bundle
#: adjustment: whoever stops there has lost nothing, whoever goes on loses little.
COSTLY_AT: Final = 16
#: The share of a program's price that a simplified one may have, or of the bytes that it reads.
SIMPLIFIED_SHARE: Final = 0.97
#: At which product what does not pay takes over.
NEVER: Final = 1 << 62

# -- compiled --------------------------------------------------------------------------------

#: Shorter stretches are not compiled.
COMPILE_FROM: Final = 2
#: Nanoseconds that the call of a compiled stretch takes, on paper.
COMPILED_CALL: Final = 12_000
#: Shorter stretches are not replayed from CUDA graphs: copies in and out take as long.
GRAPH_FROM: Final = 5
#: Runs before a graph is captured, in which libraries make what they need.
GRAPH_WARM_UP: Final = 2

# -- a matrix --------------------------------------------------------------------------------

#: The fewest products after which a matrix is considered, at the first point of a structure.
MATRIX_FROM: Final = 32
#: The fewest at points of a structure whose matrix has won before.
MATRIX_AGAIN_FROM: Final = 3
#: Nanoseconds, on paper, that an operation on many arguments takes besides, and that it takes
#: besides to write a matrix out and to compare it.
MATRIX_MAPPED: Final = 10_000
MATRIX_COMPARED: Final = 2_000_000
#: The share of a program's price that a product with its matrix may have.
MATRIX_SHARE: Final = 0.7
#: Bytes that one pass of writing out a matrix may take.
MATRIX_PASS: Final = 1 << 26
#: The share of all diagonals that may hold numbers in a band.
BAND_SHARE: Final = 1 / 3

# -- stacks ----------------------------------------------------------------------------------

#: When a stack of one size comes for this time, a program is made for it.
STACK_AT: Final = 2
#: For how many sizes programs are kept.
MOST_STACKS: Final = 4
#: Bytes of intermediates in one pass, for each thread of a processor: more leave its caches.
STACK_BYTES: Final = 1 << 22
#: The same where most of the time goes to matrix products, which gain by many arguments.
STACK_BYTES_MULTIPLIED: Final = 1 << 25
#: At how many points a program for stacks is held against the one that it was made of.
STACK_COMPARED: Final = 2
#: From how many numbers in one value on arguments are not taken together on a CPU.
LARGE_ENTRY: Final = 1 << 16
