"""`celery alchemy doctor`: what would go wrong in production, found before it does."""
