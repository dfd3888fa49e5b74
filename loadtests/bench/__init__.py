"""The benchmark: contests between worker pools and session patterns, run in turns, checked, and kept as plain facts.

Nothing here imports Locust: importing it monkey-patches the process. The load comes from `client/generator.py`, in a
process of its own.
"""
