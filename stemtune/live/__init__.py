"""Scans that are indexed while they are recorded, and models that answer over HTTP."""
