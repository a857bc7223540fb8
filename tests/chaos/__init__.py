"""Runs that are broken on purpose: `python -m tests.chaos` prints what held."""
