"""What a run reads: prompts, labelled pairs of images, the order of both, and safe reading and writing of files."""
