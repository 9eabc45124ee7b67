"""Plain HTTP on the broker's port: pages, health, and what the app's own hook answers."""
