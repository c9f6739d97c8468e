"""Decides how a budget of bytes is spent on the layers of a model: measures, then optimises."""
