"""Rules that keep the value: equal sums become equal terms (docs/matching/rules.md).

One term:

algebra      guards, ranges and bound indices, until nothing changes
naming       bound indices counted from one place and named in one order
radix        two bound indices that are the digits of one
rates        rates as prefix sums, or as those of a head
slopes       formulas of the head as rates
logs         the logarithm of a factor

Several:

merge        terms that are one
lines        those that are places of a line
fit          what moves along it
ends         those that lie at an end of a range
multiples    several multiples of one sum
weights      factors that become weights on demand
running      running sums of one tensor's tokens
begun        those that start from a number
"""
