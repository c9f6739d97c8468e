"""What a user asks of a plan: budget, menu, constraints, rules, ties."""
