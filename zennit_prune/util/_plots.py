'''Draw figures of matplotlib in one style, and import the optional libraries that only some functions need.'''
from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from ..errors import PruneError
from ._files import check_folder

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
