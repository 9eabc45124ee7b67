"""Everything the broker says to, and asks of, a backend: events, webhooks, questions."""
