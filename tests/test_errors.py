import copy
import pickle

from gametalearn.errors import InputError, summary


def test_the_message_is_one_line() -> None:
    error = InputError("file 'a\nb\r\nc': unreadable")
    assert str(error) == "file 'a b c': unreadable"
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert str(twin) == str(error)


def test_a_summary_is_short_and_printable() -> None:
    text = summary(ValueError("\x00\x1b[31m" + "x\n" * 1000))
    assert text.isprintable()
    assert len(text) <= 200
    assert summary(EOFError()) == "EOFError"
