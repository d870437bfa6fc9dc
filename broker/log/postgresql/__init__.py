"""The log on PostgreSQL: the same events, chain and projections as on SQLite, on a server of their own."""
