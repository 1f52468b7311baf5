"""Pattern to orientation: models, heads, losses, metrics, the epoch loop and what it leaves on disk."""
