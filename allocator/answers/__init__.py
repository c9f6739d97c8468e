"""Answers from a profile: what-ifs, frontiers, comparisons of plans, the uniform baseline."""
