"""BERT's words in pieces, and OPT's bytes in pairs, from the files beside their weights."""

import functools
import json
import os
import pathlib
import re
import unicodedata

from sam_jax.errors import UserError, first_line

# GPT-2's words: 's and its like, letters, digits, the rest, each with one space before it.
_GPT2 = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")

# Ideographs are words by themselves.
_IDEOGRAPHS = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2FA1F), (0xF900, 0xFAFF)]


class WordPiece:
    """BERT's tokenizer: words and punctuation marks, each cut into the longest pieces there are.

    Attributes:
      pad, unknown, first, last: the tokens [PAD], [UNK], [CLS] and [SEP].
    """

    longest = 100  # characters; a word with more is unknown

    def __init__(self, path: str | os.PathLike, lower: bool = True):
        """Reads vocab.txt, a piece a line; those within a word begin with ##.

        Args:
          path: of the file.
          lower: without capitals and accents, as the `uncased` models.

        Raises:
          UserError: no such file, or a special token is not there.
        """
        self.pieces = {piece: i for i, piece in enumerate(_read(path).split('\n')) if piece}
        self.lower = lower
        for name in ('[PAD]', '[UNK]', '[CLS]', '[SEP]'):
            if name not in self.pieces:
                raise UserError(f'{os.fspath(path)} has no line {name}; a vocabulary of BERT has.')
        self.pad, self.unknown, self.first, self.last = (
            self.pieces[name] for name in ('[PAD]', '[UNK]', '[CLS]', '[SEP]')
        )

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without special ones."""
        return [token for word in self._words(text) for token in self._cut(word)]

    def _words(self, text):
        text = ''.join(
            ' ' if c in '\t\n\r' or unicodedata.category(c) == 'Zs' else c
            for c in text
            if c in '\t\n\r' or not (unicodedata.category(c)[0] == 'C' or c in '\0\ufffd')
        )
        if self.lower:
            text = unicodedata.normalize('NFD', text.lower())
            text = ''.join(c for c in text if unicodedata.category(c) != 'Mn')
        return ''.join(f' {c} ' if _stands_alone(c) else c for c in text).split()

    def _cut(self, word):
        tokens, start = [], 0
        while start < len(word) <= self.longest:
            mark = '##' if start else ''
            for end in range(len(word), start, -1):
                if mark + word[start:end] in self.pieces:
                    tokens.append(self.pieces[mark + word[start:end]])
                    start = end
                    break
            else:
                return [self.unknown]
        return tokens or [self.unknown]


def _stands_alone(c):
    if c.isascii():
        return not (c.isalnum() or c.isspace())
    in_block = any(low <= ord(c) <= high for low, high in _IDEOGRAPHS)
    return in_block or unicodedata.category(c)[0] == 'P'


class BytePairs:
    """GPT-2's tokenizer, which is OPT's: bytes, the most frequent neighbours joined first."""

    def __init__(self, vocabulary: str | os.PathLike, merges: str | os.PathLike):
        """Reads vocab.json, {piece: token}, and merges.txt, a pair a line, the first joined first.

        Raises:
          UserError: a file is not there or not of this form.
        """
        try:
            self.pieces = json.loads(_read(vocabulary))
        except (ValueError, RecursionError) as e:
            raise UserError(
                f'{os.fspath(vocabulary)} cannot be read as JSON: {first_line(e)}.'
            ) from e
        if not (
            isinstance(self.pieces, dict) and all(type(n) is int for n in self.pieces.values())
        ):
            raise UserError(f'{os.fspath(vocabulary)} must hold a JSON object {{piece: number}}.')
        pairs = [
            tuple(line.split(' '))
            for line in _read(merges).split('\n')
            if line and not line.startswith('#version')
        ]
        bad = next((pair for pair in pairs if len(pair) != 2), None)
        if bad:
            raise UserError(f'{os.fspath(merges)}: {" ".join(bad)!r} is no pair of pieces.')
        self.ranks = {pair: i for i, pair in enumerate(pairs)}
        self._join = functools.lru_cache(None)(self._joined)

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without special ones (OPT's texts begin with token 2).

        Raises:
          UserError: the vocabulary lacks a piece.
        """
        words = (''.join(_of_bytes()[b] for b in w.encode()) for w in _GPT2.findall(text))
        try:
            return [self.pieces[piece] for word in words for piece in self._join(word)]
        except KeyError as e:
            raise UserError(f'The vocabulary has no piece {e.args[0]!r}.') from e

    def _joined(self, word):
        parts = list(word)
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            joined, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == best else 1
                joined.append(''.join(parts[i : i + step]))
                i += step
            parts = joined
        return parts


@functools.cache
def _of_bytes():
    """What stands for each byte in GPT-2's files: itself where it can be printed."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in shown)
    return {**{b: chr(b) for b in shown}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def _read(path):
    try:
        return pathlib.Path(path).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'{os.fspath(path)} cannot be read as a tokenizer: {e}.') from e
