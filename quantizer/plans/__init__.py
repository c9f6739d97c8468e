"""How a layer can be stored, and which layer is stored how. Plain Python, no torch."""
