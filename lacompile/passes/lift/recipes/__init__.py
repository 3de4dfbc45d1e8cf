"""From proofs to recipes over values of the graph (docs/matching/emission.md).

builder      the recipe of one attention
segments     of several side by side
sums         of several under one mask
states       of its final state
positions    operands at all positions, where the program has one fewer
assumptions  what a recipe takes for granted of inputs
holders      the nodes that hold what a recipe reads
doubles      other nodes that hold the same
described    what a report says of it
emit         accesses as tensors
"""
