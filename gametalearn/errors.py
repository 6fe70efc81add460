"""The error that a person's input can cause; the command line turns it into one line and exit 2."""

__all__ = ["InputError", "SharedError", "summary"]


class InputError(ValueError):
    """Bad input: its message names the argument, the value received and what to do instead.

    The message is one line, whatever names it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class SharedError(InputError):
    """Bad input that every process of a team has been told of; one of them need say it."""


def summary(error: Exception) -> str:
    """Another library's error in at most 200 printable characters, to be quoted in an `InputError`.

    >>> summary(KeyError()), summary(ValueError("bad magic\\0 number"))
    ('KeyError', 'bad magic number')
    """
    text = "".join(c for c in str(error)[:200] if c.isprintable())
    return text or type(error).__name__
