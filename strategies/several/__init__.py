"""One unit of work over several databases, and two-phase commit."""
