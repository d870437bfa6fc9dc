"""Ordain over HTTP: reads projections and sends requests to the core; decides nothing itself."""
