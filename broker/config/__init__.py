"""The settings of a broker: their fields, their checks, and the sources they are read from."""
