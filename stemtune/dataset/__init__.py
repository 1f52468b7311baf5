"""What a network trains on: the training store, simulated and measured patterns, labels and batches."""
