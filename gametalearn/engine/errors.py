"""The one reason to compute task by task that the engine's parts give each other."""

__all__ = ["UnreplayableError"]


class UnreplayableError(Exception):
    """What was asked for cannot be traced, or be known to be the same again; the message says why."""
