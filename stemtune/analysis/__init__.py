"""What an orientation map shows: grains, boundaries, clean-up, and its comparison with others."""
