"""What tests have at hand: small models, servers, commands."""
