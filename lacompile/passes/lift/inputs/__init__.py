"""What the numbers of a graph's inputs say, and what has to be guarded for that.

statics      inputs whose numbers are looked at
buffers      masks and decays that a module computed once
fitted       what was fitted, as a value
powers       powers that a program writes down
alike        sizes of several inputs that are one number
"""
