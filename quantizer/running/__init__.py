"""A model run block by block within memory: moments of inputs, logits, divergence, quality."""
