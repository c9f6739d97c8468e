"""The database: jobs, tenants, keys, outbox, the durable engine."""
