"""Numbers and pictures to decide by: draw, score, compare, and write them down."""
