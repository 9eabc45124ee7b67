"""Access: which clients may connect, and the rights of each."""
