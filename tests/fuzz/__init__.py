"""Hostile input, made from what is valid: a bounded while in `make test`, longer by `make fuzz`."""
