"""The load generator's side: imported inside Locust only."""
