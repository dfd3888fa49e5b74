"""What the workers run: workloads, and the patterns that give a task its Session."""
