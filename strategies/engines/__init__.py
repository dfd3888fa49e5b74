"""Engines: how they are made, their connection pools, and what guards their connections."""
