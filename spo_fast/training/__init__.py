"""The loop and what it stands on: set-up, learner, validation, outputs, checkpoints, several processes."""
