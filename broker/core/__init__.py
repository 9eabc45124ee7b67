"""Sessions, their subscriptions, and the history of topics: plain data, no I/O, no clock."""
