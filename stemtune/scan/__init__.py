"""The raw measurement: reading scans, and the corrections that make a pattern comparable with theory."""
