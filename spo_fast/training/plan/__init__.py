"""What is known before a run: its files, FLOPs, peak memory, and the batches that fit."""
