"""Brings events to services: event streams, MQTT and webhooks."""
