"""The stored tensors of a quantized layer: layout, packing, scales, outliers, adapter."""
