"""Descriptions of the API: OpenAPI, AsyncAPI, and the page `/docs`."""
