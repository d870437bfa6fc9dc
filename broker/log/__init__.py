"""The append-only log: its rows, its hash chain, and the one writer."""
