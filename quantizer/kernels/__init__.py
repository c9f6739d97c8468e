"""Loops over packed weights, compiled by numba and Triton; they know nothing of the other rooms.

README.md draws the layout; `quantizer.kernels.path` decides which implementation runs.
"""
