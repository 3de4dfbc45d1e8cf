"""Programs nobody wrote: the same attention in random spellings, and near twins that compute something else.

A program is source code, made from a seed. ``program.py`` draws a fact and writes it down; ``twins.py`` changes one
thing in what was written; ``judge.py`` runs the analysis, with validation off, and compares what the rewritten graph
computes with the program's own values and gradients in fp64.
"""
