"""CLIP's tokens: byte pairs that end with the word, read from vocab.json and merges.txt.

A text is put in NFC and in small letters, and cut into words: runs of letters, single digits, runs
of anything else. A word is its bytes in UTF-8, each written as a printable character, the last with
'</w>' behind it. Neighbours are joined, the pair first that stands first in merges.txt, until no
pair of the file is left.
"""

import functools
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from sam_jax.errors import UserError, first_line

START, END, OF_WORD = '<|startoftext|>', '<|endoftext|>', '</w>'
VOCABULARY, MERGES = 'vocab.json', 'merges.txt'

_SHORT = re.compile("'s|'t|'re|'ve|'m|'ll|'d")


@functools.cache
def characters() -> tuple[str, ...]:
    """The printable character of each byte: itself, or one of those from U+0100 on, in order."""
    printable = {*range(ord('!'), ord('~') + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def words(text: str) -> Iterator[str]:
    """Yields the words of a text, see above."""
    text = unicodedata.normalize('NFC', text).lower()

    def kind(character):
        # Lm and Lo are letters too, and digits are all numbers, as in the expression \p{L}|\p{N}.
        name = 'Zs' if character.isspace() else unicodedata.category(character)
        return name[0] if name[0] in 'LNZ' else ''

    place = 0
    while place < len(text):
        short, end = _SHORT.match(text, place), place + 1
        what = kind(text[place])
        if short:
            end = short.end()
        elif what in ('L', ''):
            while end < len(text) and kind(text[end]) == what:
                end += 1
        if what != 'Z':
            yield text[place:end]
        place = end


class Tokenizer:
    """Texts -> numbers of tokens.

    Attributes:
      start, end: the numbers of the tokens at a text's ends; the latter is the highest.
    """

    def __init__(self, numbers: dict[str, int], merges: list[tuple[str, str]]) -> None:
        """Takes {token: its number} and the pairs that are joined, in order.

        Raises:
          ValueError: a byte has no token, or the end token has not the highest number.
        """
        bytes_ = [c + end for c in characters() for end in ('', OF_WORD)]
        missing = next((t for t in (START, END, *bytes_) if t not in numbers), None)
        if missing is not None:
            raise ValueError(f'it has no token {missing!r}')
        if numbers[END] != max(numbers.values()):
            raise ValueError(f'{END} must have the highest number, by which it is found')
        self.start, self.end = numbers[START], numbers[END]
        self._numbers, self._ranks = numbers, {pair: i for i, pair in enumerate(merges)}

    def __call__(self, text: str) -> list[int]:
        """Returns the numbers of a text's tokens, without start and end."""
        return [self._numbers.get(t, self.end) for word in words(text) for t in self._joined(word)]

    def _joined(self, word):
        tokens = [characters()[byte] for byte in word.encode()]
        tokens[-1] += OF_WORD
        while len(tokens) > 1:
            pairs = list(zip(tokens, tokens[1:]))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            joined, i = [], 0
            while i < len(tokens):
                found = i + 1 < len(tokens) and pairs[i] == best
                joined.append(''.join(best) if found else tokens[i])
                i += 2 if found else 1
            tokens = joined
        return tokens


def of_bytes(size: int = 514) -> dict[str, int]:
    """Returns a vocabulary that joins nothing: 256 bytes, 256 at a word's end, the two last ones.

    The first 512 numbers and their order are those of OpenAI's.

    Args:
      size: number of all tokens; those in between do not occur.
    """
    order = sorted(characters(), key=lambda c: (ord(c) >= 0x100, ord(c)))
    tokens = [*order, *(c + OF_WORD for c in order)]
    return {**{t: i for i, t in enumerate(tokens)}, START: size - 2, END: size - 1}


def read(folder: str, size: int) -> Tokenizer:
    """Returns the tokenizer of vocab.json and merges.txt in a folder.

    Args:
      folder: of transformers' CLIP.
      size: number of tokens of the model.

    Raises:
      UserError: a file is not there or damaged, or has numbers that the model does not.
    """
    path = os.path.join(folder, VOCABULARY)
    numbers = _read(path, json.loads)
    if not (isinstance(numbers, dict) and all(type(n) is int for n in numbers.values())):
        raise UserError(f'{path} must hold a JSON object of the tokens and their numbers.')
    other = next((t for t, n in numbers.items() if not 0 <= n < size), None)
    if other is not None:
        raise UserError(
            f'{path} has the token {other!r} of number {numbers[other]}; the model has {size}.'
        )
    merges_path = os.path.join(folder, MERGES)
    lines = [line for line in _read(merges_path, str.splitlines) if line.strip()]
    # The first line says the version.
    pairs: list[Any] = [tuple(line.split()) for line in lines if not line.startswith('#version')]
    odd = next((i for i, pair in enumerate(pairs) if len(pair) != 2), None)
    if odd is not None:
        raise UserError(
            f'{merges_path} must hold two tokens a line; pair {odd} is {" ".join(pairs[odd])!r}.'
        )
    try:
        return Tokenizer(numbers, pairs)
    except ValueError as e:
        raise UserError(f'{path} is no vocabulary of CLIP: {e}.') from e


def _read(path, parse):
    try:
        with open(path, encoding='utf-8') as file:
            return parse(file.read())
    except FileNotFoundError as e:
        raise UserError(
            f'There is no {path}; the folder of a CLIP of transformers has {VOCABULARY} and '
            f'{MERGES}.'
        ) from e
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f'{path} cannot be read: {first_line(e)}.') from e


def write(folder: str, numbers: dict[str, int]) -> None:
    """Writes vocab.json, and merges.txt without any pair, as transformers reads them."""
    with open(os.path.join(folder, VOCABULARY), 'w', encoding='utf-8') as file:
        json.dump(numbers, file, ensure_ascii=False)
    with open(os.path.join(folder, MERGES), 'w', encoding='utf-8') as file:
        file.write('#version: 0.2\n')
