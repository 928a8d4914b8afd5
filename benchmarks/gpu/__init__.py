"""One command on a machine with a GPU, ``make gpu``: facts, tests, parity, measurements, targets. See ``__main__``."""
