"""`python -m broker`: the command line, see `broker.cli.main`."""

from broker.cli.main import main

main()
