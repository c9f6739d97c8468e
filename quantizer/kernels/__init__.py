"""Products with packed weights; see README.md here for the layout and `quantizer.kernels.dispatch` for which one runs when."""
