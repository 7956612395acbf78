"""Layer 0: the few tensor operations of our own. One file an op; `python -m spo_fast.ops` prints a table."""
