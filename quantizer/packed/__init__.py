"""The stored tensors of a quantized layer: layout, packed codes, scales, outliers, adapter."""
