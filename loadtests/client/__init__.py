"""The load generator's side: imported inside Locust only, for Locust monkey-patches whatever imports it."""
