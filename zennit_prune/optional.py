'''Libraries that only some functions need.'''
from __future__ import annotations

from importlib import import_module
from typing import Any

from .errors import PruneError


def needed(module: str, extra: str, what: str) -> Any:
    '''Import a module of an optional dependency.

    Parameters
    ----------
    module: str
        The module, e.g. ``'matplotlib.figure'``.
    extra: str
        The extra of this package that installs it.
    what: str
        What needs it, for the error.

    Raises
    ------
    PruneError
        If it is not installed.
    '''
    try:
        return import_module(module)
    except ImportError as error:
        raise PruneError(f"{what} needs {module.partition('.')[0]}: pip install 'zennit-prune[{extra}]'.") from error
