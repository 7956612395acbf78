"""The papers' part: noise schedules, rollouts, and the losses on what they collect."""
