"""What a result directory says: statistics, recommendation, page, terminal summary and comparison.

Everything here is computed from the files that `bench/results.py` describes, and from nothing else.
"""
