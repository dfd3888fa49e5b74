"""Tasks whose effects in the database happen once, however often they are delivered."""
