"""The benchmark: contests between worker pools and session patterns, run in turns, checked, and kept as plain facts.

Nothing here is monkey-patched: the load comes from `client/generator.py`, in a process of its own.
"""
