"""A stage in a process of its own."""
