"""Routing: publications, from the node to their recipients."""
