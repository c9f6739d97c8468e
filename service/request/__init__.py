"""What a user asks for: the options of a run, written once."""
