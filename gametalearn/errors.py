"""The error that a person's input can cause; the command line turns it into one line and exit 2."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Bad input: its message names the argument, the value received and what to do instead."""
