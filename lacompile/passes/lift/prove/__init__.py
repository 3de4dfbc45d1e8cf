"""Which values are decayed attentions (docs/matching/proof.md).

proof        what was proved
obligations  what has to be, one by one
roles        which index is what, and which factors are q, k and v
decay        the weight
features     weights that differ by feature alone, which are factors
addends      a state that came in, and plain terms
flattened    heads and features in one dimension
chunked      rows in two
backwards    sums over later positions
step         one token
fragments    chunks of a loop that do not merge
causes       why a sum is no decayed attention
unrolled     why a loop is none, where no sum of it is
spoken       forms as a report says them
"""
