"""Products with packed weights; see README.md here for the layout and `quantizer.kernels.path` for which one runs when."""
