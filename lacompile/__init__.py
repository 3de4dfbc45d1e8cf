"""lacompile: linear attention found in any PyTorch program, and compiled to one operator."""

__version__ = "0.1.0"
