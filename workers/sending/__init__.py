"""Messages that wait for a COMMIT."""
