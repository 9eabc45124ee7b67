"""The settings of a broker: what they are, how they are checked, where they are read from."""
