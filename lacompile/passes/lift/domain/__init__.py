"""What a normal form is made of (docs/matching/domain.md), and what is known of its numbers.

choices      how a graph is read where there is more than one way
affine       integer-affine indices
divisions    floor divisions, and the bounds of affine forms over a box
space        products of sizes, and mixed radix with symbolic ones
digits       what of a divided dimension an index depends on
sizes        sizes of the traced program
exponent     accesses of leaves, and weights made of them
term         terms, cases and values
kinds        what a leaf may be: the tensors that terms speak about
intervals    how large their entries are
leaves       the table of them
prefix       rates along tokens, and their prefix sums
regions      boxes cut by guards, and what they imply
evaluate     the number of a normal form at one index
precision    how far the program's own numbers are those of the normal form
"""
