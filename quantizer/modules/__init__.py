"""Packed modules that take the place of `nn.Linear` and `nn.Embedding`, and their products."""
