"""The console: what operators see, as files for a browser. It uses the public API and nothing else."""
