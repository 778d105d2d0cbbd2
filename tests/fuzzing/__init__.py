"""Random input for everything that is read: settings, command lines, files of others.

A case is drawn by hypothesis and is refused by one sentence, or gives a valid result. Anything else
is a fault. `python scripts/fuzz.py` runs many cases; tests/fuzz_test.py runs a few of each kind.
"""

import collections

OUTCOMES: collections.Counter[str] = collections.Counter()


class Fault(AssertionError):
    """What must not happen: another error, no sentence, a number that is not finite."""


def check_sentence(message: str) -> None:
    """Raises Fault if a message is not one sentence on one line."""
    if '\n' in message or 'Traceback' in message:
        raise Fault(f'not one line: {message!r}')
    if not message.endswith(('.', '"', ')', '?')) or len(message) < 10:
        raise Fault(f'no sentence: {message!r}')
