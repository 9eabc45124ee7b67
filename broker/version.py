"""The version, in a place of its own: the wire, the command line and the package all name it."""

VERSION = "0.1.0"
