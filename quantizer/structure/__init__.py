"""What a model is made of: its blocks, experts and linear layers, and which of them stay."""
