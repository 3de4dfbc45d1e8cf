"""From a Dynamo graph to facts: every value's normal form, and the decayed attentions among them.

analysis     a graph is read, and what is found in it
readings     the other ways to read it
nested       attentions of what other attentions have made
match        the search among the values of one reading
recipes      what replaces a value
prove        is it a decayed attention?
interpret    each node's result
inputs       what the numbers of inputs say
transfer     one rule for each ATen operation
engine       operations on values
normal       rules that make equal sums equal terms
domain       what a normal form is made of
"""

from __future__ import annotations

from .analysis import Analysis, analyse

__all__ = ["Analysis", "analyse"]
