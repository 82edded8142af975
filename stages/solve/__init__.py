"""Solvers: pure functions from the weights and statistics of one layer to a small solution."""
