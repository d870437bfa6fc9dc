"""Simulated devices, for trying Ordain out and for load tests."""
