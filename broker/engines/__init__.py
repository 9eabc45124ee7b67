"""Engines: they keep history (and, with more than one node, join the nodes)."""
