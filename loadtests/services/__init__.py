"""Servers, workers and processes of a run; and the guard that ends them."""
