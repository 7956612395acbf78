"""Every setting of a run, what it may hold and its defaults, and the command line made of them. Imports no PyTorch."""
