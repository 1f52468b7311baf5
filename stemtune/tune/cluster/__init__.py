"""Ray clusters: joining one, checking its nodes, and spreading work over it."""
