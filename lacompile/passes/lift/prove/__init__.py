"""Which values are decayed attentions (docs/how-matching-works.md, section 5).

proof        what was proved
obligations  what has to be, one by one
roles        which index is what, and which factors are q, k and v
decay        the weight
addends      a state that came in, and plain terms
flattened    heads and features in one dimension
chunked      rows in two
backwards    sums over later positions
step         one token
causes       why a sum is no decayed attention
spoken       forms as a report says them
"""
