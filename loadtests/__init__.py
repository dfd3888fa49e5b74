"""Real workers under load: services, a worker starter, a workload, invariants, and the demo that joins them.

Nothing here imports Locust: importing it monkey-patches the process.
"""
