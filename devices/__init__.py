"""Ordain's device side: what the maker of a device would import."""
