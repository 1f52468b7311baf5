"""Orientation maps: their pixels, frames and phases, and the files in which programs keep them."""
