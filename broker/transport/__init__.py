"""Bytes and frames between the socket and a session. Knows no topics."""
