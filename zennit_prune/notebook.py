'''How results look in a notebook: the tables that are printed, as HTML that suits light and dark pages.'''
from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .tables import Share, Table, cell, is_numeric

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

def panel(title: str, tables: Sequence[Table] = (), notes: Sequence[str] = ()) -> str:
    '''A title, tables of a header and rows, and notes below, all of it escaped.'''
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
