"""The HTTP API: handlers read projections and pass requests to the core. They decide nothing themselves."""
