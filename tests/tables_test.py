"""Markdown tables: their form, and what may stand in a cell."""

import markdown
import pytest

from sam_jax import tables


def test_a_table():
    assert tables.markdown(['rho', 'error'], [[0.1, '3.0 ± 0.1'], ['', 2]]) == (
        '| rho | error |\n|---|---|\n| 0.1 | 3.0 ± 0.1 |\n|  | 2 |'
    )
    assert tables.markdown(['', 'a'], []) == '|  | a |\n|---|---|'


def test_rows_are_as_long_as_the_head():
    with pytest.raises(ValueError, match='1 cells in a table of 2 columns'):
        tables.markdown(['a', 'b'], [['x']])


def test_columns_that_are_empty_in_all_records_are_left_out():
    records = [{'a': '', 'b': 0, 'c': ''}, {'a': '', 'b': '', 'c': 'x'}]
    assert tables.of_records(records) == '| b | c |\n|---|---|\n| 0 |  |\n|  | x |'


@pytest.mark.parametrize(
    'text,shown',
    [
        ('a|b', 'a|b'),
        ('one\ntwo', 'one two'),
        ('<b>x</b>', '&lt;b&gt;x&lt;/b&gt;'),
        ('<0.1', '&lt;0.1'),
        ('<!-- x', '&lt;!-- x'),
    ],
)
def test_a_cell_stays_one_cell_and_is_no_html(text, shown):
    html = markdown.markdown(tables.markdown(['head'], [[text]]), extensions=['tables'])
    assert f'<td>{shown}</td>' in html and html.count('<td>') == 1
