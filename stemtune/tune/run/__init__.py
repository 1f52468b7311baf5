"""A search as it runs: the Tune experiment, its trials, what is kept, and what is recorded."""
