"""Events of connections, on their way to their readers."""
