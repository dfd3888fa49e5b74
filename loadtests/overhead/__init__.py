"""What the layer costs per task, beside the same task written by hand: counted and timed."""
