"""From orientations to what a microscopist reads: maps, pictures, exports and figures of merit."""
