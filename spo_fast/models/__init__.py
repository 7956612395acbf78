"""What is trained: the diffusion model's parts, its trainable weights, and how they are computed."""
