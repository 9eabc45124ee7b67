"""Signals: what the system asks of this process."""
