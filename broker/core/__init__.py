"""Who is connected, who listens to what, what is kept: plain data, no I/O, no clock."""
