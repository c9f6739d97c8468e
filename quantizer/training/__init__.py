"""Codes and scales by gradient descent: block by block, and end to end."""
