"""What is watched while a run goes on: metrics, progress, times, the GPU, warnings."""
