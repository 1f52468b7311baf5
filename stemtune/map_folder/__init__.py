"""The folder of files that a predicted map is kept in: written, re-analysed and cleaned up."""
