"""Where a model's files come from and what they are turned into: hub, directory, single file, LoRA."""
