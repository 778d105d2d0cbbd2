"""Sentences and their classes from tables with tabs between the columns, as GLUE's are."""

import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sam_jax.errors import UserError
from sam_jax.language.tokenizers import WordPiece


class Sentences(NamedTuple):
    """Texts, or pairs of them, with a class each.

    Attributes:
      texts: (first, second), where second is '' if there is none.
      labels: (N,) int32.
    """

    texts: list[tuple[str, str]]
    labels: np.ndarray


def read(
    path: str | os.PathLike,
    text: str | int = 'sentence',
    label: str | int = 'label',
    pair: str | int | None = None,
    classes: Mapping[str, int] | None = None,
) -> Sentences:
    """Reads a table of sentences, UTF-8, one a line, without quotes that would mean anything.

    Args:
      path: of the file.
      text, label, pair: the columns of first text, class and second text: names, of the first line,
        or numbers from 0 of a table that has no such line (CoLA). All three of one kind.
      classes: {what stands in the table: its number}; None where numbers stand there.

    Raises:
      UserError: no such file, a column is not there, or a class is not known; names the line.
    """
    try:
        lines = pathlib.Path(path).read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'{os.fspath(path)} cannot be read as a table: {e}.') from e
    columns = [c for c in (text, label, pair) if c is not None]
    named = isinstance(text, str)
    head = lines[0].split('\t') if lines and named else []
    for column in columns:
        if named and column not in head:
            raise UserError(
                f'{os.fspath(path)} has no column {column!r}; its columns are {", ".join(head)}.'
            )
    numbers = [head.index(str(c)) if named else int(c) for c in columns]
    texts, labels = [], []
    for number, line in enumerate(lines[named:], 1 + named):
        cells = line.split('\t')
        if len(cells) <= max(numbers):
            raise UserError(
                f'{os.fspath(path)}, line {number}: {len(cells)} columns, where '
                f'{max(numbers) + 1} are needed.'
            )
        first, of_class, *second = (cells[i] for i in numbers)
        texts.append((first, second[0] if second else ''))
        labels.append(_class(of_class, classes, f'{os.fspath(path)}, line {number}'))
    if not texts:
        raise UserError(f'{os.fspath(path)} holds no sentences.')
    return Sentences(texts, np.asarray(labels, np.int32))


def _class(cell, classes, where):
    known = classes.keys() if classes else None
    if known is None and cell.isdecimal():
        return int(cell)
    if known is not None and cell in known:
        return classes[cell]
    wanted = f'one of {", ".join(known)}' if known else 'a number, or named in `classes`'
    raise UserError(f'{where}: the class is {cell!r}; it must be {wanted}.')


def encode(
    sentences: Sentences, tokenizer: WordPiece, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (tokens, mask, types), each (N, length), as BERT takes them.

    [CLS] first [SEP], or [CLS] first [SEP] second [SEP] with the second of type 1, and [PAD] to the
    end. What is too long loses the last token of the longer text until it fits, of two as long that
    of the second.
    """
    shape = len(sentences.texts), length
    tokens, types = np.full(shape, tokenizer.pad, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, bool)
    for i, pair in enumerate(sentences.texts):
        first, second = map(tokenizer.encode, pair)
        special = 3 if pair[1] else 2
        while len(first) + len(second) + special > length:
            (first if len(first) > len(second) else second).pop()
        row = [tokenizer.first, *first, tokenizer.last]
        kinds = [0] * len(row)
        if pair[1]:
            row += [*second, tokenizer.last]
            kinds += [1] * (len(second) + 1)
        tokens[i, : len(row)], types[i, : len(row)], mask[i, : len(row)] = row, kinds, True
    return tokens, mask, types
