"""What the numbers of a graph's inputs say, and what has to be guarded for that.

statics      inputs whose numbers are looked at
buffers      masks and decays that a module computed once
alike        sizes of several inputs that are one number
"""
