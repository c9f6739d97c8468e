"""Decides how a budget of bytes is spent on a model's layers: measures, then optimises."""
