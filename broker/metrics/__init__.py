"""Metrics for Prometheus: what is counted, and histograms that cost little."""
