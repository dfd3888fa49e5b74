"""What the workers are doing: remote control, warnings, metrics."""
