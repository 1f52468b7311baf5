"""Files of crystal maps, a module per format with its reader and its writer."""
