"""Measure a model, and check what a profile predicts. The only room of this package with torch."""
