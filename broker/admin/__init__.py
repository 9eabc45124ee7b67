"""The methods behind the dashboard (ADR 30): operators look at a node by them, and act on it."""
