"""Pictures of maps: inverse pole figures, grains, pole figures, and the report."""
