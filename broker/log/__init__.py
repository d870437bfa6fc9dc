"""The append-only log: its tables, its hash chain, erasing, and the export format."""
