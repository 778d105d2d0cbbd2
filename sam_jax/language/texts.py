"""Texts of files, and of what ships with Python and with Debian; characters as tokens; windows."""

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from sam_jax.errors import UserError

# Token 0 is any other character.
CHARACTERS = '\n' + ''.join(map(chr, range(32, 127)))
VOCABULARY = len(CHARACTERS) + 1

LICENCES = pathlib.Path('/usr/share/common-licenses')


class Text(NamedTuple):
    """A text and where it is from."""

    name: str
    text: str

    def described(self) -> str:
        """Returns the name, the number of characters and the start of the SHA-256."""
        checksum = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        return f'{self.name}: {len(self.text)} characters, sha256 {checksum}'


def python_topics() -> Text:
    """Returns the topics of Python's `help()`, in the order of their names, each paragraph once.

    Raises:
      UserError: this Python has none.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise UserError('This Python has no pydoc_data.topics: give a file with a text.') from e
    return Text('topics of Python', paragraphs(topics[name] for name in sorted(topics)))


def licences(folder: pathlib.Path = LICENCES) -> Text:
    """Returns Debian's common licences, in the order of their names, each paragraph once.

    Raises:
      UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder, as Debian has it; give a file with a text.')
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    return Text('licences of Debian', paragraphs(read(path).text for path in files))


SHIPPED: dict[str, Callable[[], Text]] = {'python': python_topics, 'licences': licences}


def find(name: str) -> Text:
    """Returns a text that ships with the machine, by its name in SHIPPED, or a file's.

    Raises:
      UserError: it is not there or cannot be read.
    """
    return SHIPPED[name]() if name in SHIPPED else read(name)


def read(path: str | os.PathLike) -> Text:
    """Returns the text of a file, UTF-8.

    Raises:
      UserError: there is no such file, it is not UTF-8 or has nothing in it.
    """
    try:
        text = pathlib.Path(path).read_text(encoding='utf-8')
    except OSError as e:
        raise UserError(
            f'{os.fspath(path)}: no such text, it is none of {", ".join(SHIPPED)} '
            'and no file that can be read.'
        ) from e
    except UnicodeDecodeError as e:
        raise UserError(f'{os.fspath(path)} is not UTF-8: byte {e.start} is none of a text.') from e
    if not text.strip():
        raise UserError(f'{os.fspath(path)} is empty; it must hold a text.')
    return Text(os.path.basename(path), text)


def paragraphs(texts: Iterable[str]) -> str:
    """Returns the paragraphs of all texts, what stands twice only once.

    Manuals and licences repeat themselves; a test text would else be one that was learned.
    """
    found = dict.fromkeys(part.strip('\n') for text in texts for part in text.split('\n\n'))
    return '\n\n'.join(part for part in found if part.strip()) + '\n'


def encode(text: str) -> np.ndarray:
    """Returns the characters of a text as tokens, int32; token 0 for those not in CHARACTERS."""
    table = np.zeros(128, np.int32)
    table[[ord(c) for c in CHARACTERS]] = np.arange(1, VOCABULARY)
    codes = np.frombuffer(text.encode('utf-32-le'), np.uint32)
    return np.where(codes < 128, table[np.minimum(codes, 127)], 0).astype(np.int32)


def decode(tokens: Iterable[int]) -> str:
    """Returns the text of tokens; '?' for token 0."""
    return ''.join(('?' + CHARACTERS)[token] for token in tokens)


def split(tokens: np.ndarray, share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the beginning, which is learned; the last `share`, which is not)."""
    cut = len(tokens) - int(share * len(tokens))
    return tokens[:cut], tokens[cut:]


def windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """Returns (N, length + 1): each token but the first is predicted in one of them.

    The last token of a window is the first of the next. What is too short at the end is left out.

    Raises:
      UserError: there are not length + 1 tokens.
    """
    count = (len(tokens) - 1) // length
    if count < 1:
        raise UserError(
            f'A text of {len(tokens)} tokens is too short for a window: at least {length + 1}.'
        )
    return np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(count)])
