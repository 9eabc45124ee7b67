"""Webhooks: HTTP requests to the app's backend, with events or for the proxy."""
