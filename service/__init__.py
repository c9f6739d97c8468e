"""Offers the quantizer and the allocator to people and pipelines."""
