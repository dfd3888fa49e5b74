"""From worker start to shutdown."""
