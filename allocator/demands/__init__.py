"""What is asked of a plan: budget, menu, constraints, rules, ties."""
