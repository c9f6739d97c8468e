"""Products with packed weights.

See README.md here for the layout and `quantizer.kernels.path` for which one runs when.
"""
