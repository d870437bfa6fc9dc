"""The command line `ordain`."""
