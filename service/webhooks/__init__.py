"""Webhooks: which addresses are allowed, how messages are signed and sent."""
