"""Which weights matter: Fisher information, path integrals, saliency."""
