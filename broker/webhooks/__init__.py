"""HTTP requests to the app's backend: events, and questions."""
