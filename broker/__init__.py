"""Ordain's command side: one program that records, delivers and explains commands."""

__version__ = "0.1.0"
