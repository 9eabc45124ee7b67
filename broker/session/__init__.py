"""One client, from its accepted stream to its last word."""
