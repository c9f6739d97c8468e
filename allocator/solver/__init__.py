"""The allocation program and its solution, in numbers only."""
