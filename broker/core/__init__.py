"""What the broker knows and decides, as plain data: no I/O, no clock, no tasks.

Rule: nothing in here imports trio, a socket, a clock, a logger or a source of chance; what it
needs of them comes as an argument. `tests/test_imports.py` holds the line.
"""
