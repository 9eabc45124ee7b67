"""What operators see of a node and may do to it: the methods behind the dashboard (ADR 30)."""
