"""Modules that take the place of linear layers and embeddings, and their matrix products."""
