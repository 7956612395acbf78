"""Layer 0: the few tensor operations that are the project's own. One file an op; `python -m spo_fast.ops` prints a table."""
