"""The read side: tables that are computed from the log only."""
