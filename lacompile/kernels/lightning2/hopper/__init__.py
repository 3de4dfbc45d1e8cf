"""The same computation for Hopper (compute capability 9.0), in Gluon: see :mod:`.body`."""
