"""What the units of work of this process are doing, for people and for metrics."""
