"""A whole model to a quantized checkpoint, and back into transformers."""
