"""From patterns to orientations: prediction, template matching, refinement, overlapping crystals and phases."""
