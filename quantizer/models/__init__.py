"""Models on disk: found, checked, converted, loaded."""
