"""The error that a person's input can cause; the command line turns it into one line and exit 2."""

import operator

__all__ = ["InputError", "SharedError", "require_whole", "summary"]


class InputError(ValueError):
    """Bad input: its message names the argument, the value received and what to do instead.

    The message is one line, whatever names it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class SharedError(InputError):
    """Bad input that every process of a team has been told of; one of them need say it."""


def require_whole(name: str, value: object, least: int) -> None:
    """Raise an `InputError` for what is no integer of at least ``least``; ``name`` says what it is for.

    >>> require_whole("`shots`", 1.5, 1)
    Traceback (most recent call last):
    ...
    gametalearn.errors.InputError: `shots` must be an integer, got 1.5
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # NumPy's integers too
    except TypeError as error:
        raise InputError(f"{name} must be an integer, got {value!r}") from error
    if isinstance(value, bool):
        raise InputError(f"{name} must be an integer, got {value}")
    if number < least:
        raise InputError(f"{name} must be at least {least}, got {value}")


def summary(error: Exception) -> str:
    """Another library's error in at most 200 printable characters, to be quoted in an `InputError`.

    >>> summary(KeyError()), summary(ValueError("bad magic\\0 number"))
    ('KeyError', 'bad magic number')
    """
    text = "".join(c for c in str(error)[:200] if c.isprintable())
    return text or type(error).__name__
