"""The load generator's side: what imports Locust or gevent here is imported in processes of its own only."""
