"""What judges the candidates: one scorer a file, named in registry.py."""
