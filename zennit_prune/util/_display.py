'''Show results and progress: tables as text and as HTML for notebooks, figures of matplotlib in one style, a bar.

The HTML suits light and dark pages. The bar counts modules and appears only where a call takes more than some seconds.
Optional libraries, which only some functions need, are imported here as well.
'''
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from html import escape
from importlib import import_module
from typing import Any

from tqdm.auto import tqdm

from ..errors import PruneError
from ._files import check_folder

WIDEST = 60
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # a header and rows
STYLE = '''<style>
.zennit-prune {font-size: 13px; line-height: 1.45; max-width: 60rem; color: inherit}
.zennit-prune b {font-weight: 600}
.zennit-prune .zp-scroll {max-height: 26rem; overflow: auto; margin: .4rem 0}
.zennit-prune table {border-collapse: collapse; margin: 0; font-variant-numeric: tabular-nums}
.zennit-prune th, .zennit-prune td {text-align: left; padding: .18rem 1rem .18rem 0; vertical-align: top;
 border: 0; border-bottom: 1px solid rgba(127, 127, 127, .3); background: none; color: inherit; white-space: normal}
.zennit-prune th {font-weight: 600; opacity: .7}
.zennit-prune .zp-number {text-align: right; white-space: nowrap}
.zennit-prune i {display: inline-block; width: 5rem; height: .5rem; margin-right: .5rem; border-radius: 2px;
 background: rgba(127, 127, 127, .3)}
.zennit-prune i span {display: block; height: 100%; border-radius: 2px; background: #3b82c4}
.zennit-prune p {margin: .15rem 0; opacity: .8}
</style>'''
PATIENCE = 2.0  # seconds


class Share(str):
    '''A share, written in per cent; drawn as a bar where that can be done.'''

    def __new__(cls, value: float) -> Share:
        '''Make a share from a number from 0 to 1.'''
        written = super().__new__(cls, f'{value:.0%}')
        written.value = value
        return written

    value: float


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    '''Write columns under a header; numbers are aligned to the right, long cells are cut except in the last column.'''
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
    '''Write a list to read, cut after ``limit`` names.'''
    names = list(names)
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more


def is_numeric(rows: Sequence[Sequence[Any]], column: int) -> bool:
    '''Return whether a column holds numbers only.'''
    return bool(rows) and all(isinstance(row[column], (int, float)) for row in rows)


def cell(value: Any) -> str:
    '''Return the text of a value.'''
    return f'{value:,}' if isinstance(value, int) else f'{value:.4g}' if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else text[:WIDEST - 3] + '...'


def panel(title: str, tables: Sequence[Table] = (), notes: Sequence[str] = ()) -> str:
    '''Write a title, tables of a header and rows, and notes below as HTML, all of it escaped.'''
    parts = [STYLE, '<div class="zennit-prune">', f'<b>{escape(title)}</b>', *(_drawn(*one) for one in tables),
             *(f'<p>{escape(note)}</p>' for note in notes), '</div>']
    return '\n'.join(parts)


def _drawn(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    numeric = [is_numeric(rows, column) for column in range(len(header))]

    def line(tag: str, texts: Sequence[str]) -> str:
        return '<tr>' + ''.join(f'<{tag}{" class=zp-number" * right}>{text}</{tag}>'
                                for text, right in zip(texts, numeric)) + '</tr>'

    body = '\n'.join(line('td', [_cell(value) for value in row]) for row in rows)
    return (f'<div class="zp-scroll"><table><thead>{line("th", [escape(name) for name in header])}</thead>\n'
            f'<tbody>{body}</tbody></table></div>')


def _cell(value: Any) -> str:
    if isinstance(value, Share):
        return f'<i><span style="width:{min(max(value.value, 0), 1):.1%}"></span></i>{escape(value)}'
    return escape(cell(value))


_bar: ContextVar[Any] = ContextVar('bar', default=None)


@contextmanager
def waiting(what: str, shown: bool = True) -> Iterator[None]:
    '''Show a bar on standard error inside the context, which :func:`advance` moves.'''
    with tqdm(desc=what, unit=' modules', delay=PATIENCE, leave=False, disable=not shown) as bar:
        token = _bar.set(bar)
        try:
            yield
        finally:
            _bar.reset(token)


def advance() -> None:
    '''Move the bar of :func:`waiting` on by one module.'''
    bar = _bar.get()
    if bar is not None:
        bar.update()


KEPT, BEFORE = '#0072b2', '0.85'


def needed(module: str, extra: str, what: str) -> Any:
    '''Import a module of an optional dependency.

    Parameters
    ----------
    module: str
        The module, e.g. ``'matplotlib.figure'``.
    extra: str
        The extra of this package that installs it.
    what: str
        The function that needs it, for the error.

    Raises
    ------
    PruneError
        If it is not installed.
    '''
    try:
        return import_module(module)
    except ImportError as error:
        raise PruneError(f"{what} needs {module.partition('.')[0]}: pip install 'zennit-prune[{extra}]'.") from error


def new_figure(path: str | os.PathLike[str] | None, size: tuple[float, float]) -> Any:
    '''Return an empty matplotlib figure of a size in inches; the folder of ``path`` has to be there.'''
    figure = needed('matplotlib.figure', 'plot', 'plot()').Figure(figsize=size, layout='constrained')
    if path is not None:
        check_folder(path)
    return figure


def finished(figure: Any, panels: Iterable[Any], path: str | os.PathLike[str] | None) -> Any:
    '''Return the figure without the upper and right lines of its panels, written to ``path`` where there is one.'''
    for axes in panels:
        axes.spines[['top', 'right']].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def without_mathematics(name: str) -> str:
    '''Return a name without signs that would be read as mathematics.'''
    return name.replace('$', r'\$')
