"""Ordain's read side: functions of the log."""
