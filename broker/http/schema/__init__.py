"""Descriptions of the API for machines and people: OpenAPI, AsyncAPI, the page `/docs`."""
