'''Plain text tables and lists.'''
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

WIDEST = 60
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # a header and rows


class Share(str):
    '''A share, written in per cent; drawn as a bar where that can be done.'''

    def __new__(cls, value: float) -> Share:
        '''Of a number from 0 to 1.'''
        written = super().__new__(cls, f'{value:.0%}')
        written.value = value
        return written

    value: float


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    '''Columns under a header; numbers are aligned to the right, long cells are cut except in the last column.'''
    last = len(header) - 1
    cells = [[cell(value) if column == last else _cut(cell(value)) for column, value in enumerate(row)]
             for row in rows]
    widths = [max(len(row[column]) for row in [list(header), *cells]) for column in range(len(header))]
    numeric = [is_numeric(rows, column) for column in range(len(header))]

    def line(values: Sequence[str]) -> str:
        return '  '.join(value.rjust(width) if right else value.ljust(width)
                         for value, width, right in zip(values, widths, numeric)).rstrip()

    return '\n'.join([line(header), line(['-' * width for width in widths]), *map(line, cells)])


def some(names: Iterable[str], limit: int = 8) -> str:
    '''A list to read, cut after ``limit`` names.'''
    names = list(names)
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more


def is_numeric(rows: Sequence[Sequence[Any]], column: int) -> bool:
    '''Whether a column holds numbers only.'''
    return bool(rows) and all(isinstance(row[column], (int, float)) for row in rows)


def cell(value: Any) -> str:
    '''A value as it is written.'''
    return f'{value:,}' if isinstance(value, int) else f'{value:.4g}' if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else text[:WIDEST - 3] + '...'
