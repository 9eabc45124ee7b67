"""`python -m broker`: the command line, see `broker.cli`."""

from broker.cli import main

main()
