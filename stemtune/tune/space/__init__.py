"""Search spaces: read from YAML, checked, drawn from."""
