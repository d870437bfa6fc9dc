"""The operator's tools: backup, export and import, checkpoints, replay, doctor."""
