"""What keeps history (and, with more than one node, joins them)."""
