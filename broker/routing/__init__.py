"""Who gets what is published."""
