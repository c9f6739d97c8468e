"""How a layer can be stored, and which layer of a model is stored how. Plain Python, no torch."""
