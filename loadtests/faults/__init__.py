"""Faults caused on purpose, and the damage that each way to give a task its Session takes from them."""
