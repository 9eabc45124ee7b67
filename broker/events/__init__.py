"""What has happened to connections, on its way to whoever reads it."""
