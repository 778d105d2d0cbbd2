"""Tables in Markdown: the one way in which the project writes them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table.

    Args:
      head: the names of the columns.
      rows: the cells of each row, as many as there are columns; shown as `str` has them.

    Raises:
      ValueError: a row has more or fewer cells than there are columns.
    """
    lines = [_line(map(_cell, head)), f'|{"---|" * len(head)}']
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f'{len(row)} cells in a table of {len(head)} columns: {row}')
        lines.append(_line(map(_cell, row)))
    return '\n'.join(lines)


def of_records(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the Markdown table of dicts with the same keys.

    A column whose cells are all '' is left out.
    """
    columns = [name for name in records[0] if any(record[name] != '' for record in records)]
    return markdown(columns, [[record[name] for name in columns] for record in records])


def _line(cells):
    return f'| {" | ".join(cells)} |'


def _cell(value):
    # What would end the cell or the row, or begin a tag of HTML.
    text = str(value).replace('|', r'\|').replace('\n', ' ')
    return re.sub(r'<(?=[a-zA-Z/!])', '&lt;', text)
