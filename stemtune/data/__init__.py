"""Patterns on disk and in memory: readers, calibration, the store, and shuffled batches out of it."""
