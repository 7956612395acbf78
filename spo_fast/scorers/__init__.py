"""Scorers by their records (config/scorers.py): what says which candidate is better."""
