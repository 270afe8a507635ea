'''Sphinx: the pages of this folder, and the API reference from the docstrings.'''
from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from docutils import nodes
from numpydoc.xref import DEFAULT_LINKS
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import zennit_prune

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from docstrings import PACKAGE, public_names, spaced  # noqa: E402

project = 'zennit_prune'
author = 'the authors of zennit_prune'
release = version = zennit_prune.__version__
extensions = ['sphinx.ext.autodoc', 'sphinx.ext.intersphinx', 'sphinx.ext.mathjax', 'numpydoc', 'myst_parser']
exclude_patterns = ['inventories']
html_theme = 'alabaster'
html_theme_options = {'description': zennit_prune.__doc__.splitlines()[0], 'page_width': '1200px',
                      'sidebar_width': '260px'}
html_show_copyright = False
html_copy_source = False
nitpicky = False  # a type that no inventory knows stays plain text

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # docstrings say more: shapes, units, what is allowed
numpydoc_show_class_members = False  # autodoc lists them
numpydoc_xref_param_type = True
numpydoc_xref_ignore = 'all'  # words of prose in a type are no cross-references; the names below are

myst_heading_anchors = 3  # pages link to each other's headings as on a code host

# Where others document what we refer to. Sphinx asks their servers first (None), and where it does not reach one, reads
# the file beside it, which lists the few objects that docstrings mention: no build fails for want of a network. Another
# object is one line there, "name type page", in the first version of the format, which is plain text.
INVENTORIES = HERE / 'inventories'
intersphinx_mapping = {name: (url, (None, str(INVENTORIES / f'{name}.txt'))) for name, url in {
    'python': 'https://docs.python.org/3', 'numpy': 'https://numpy.org/doc/stable',
    'torch': 'https://docs.pytorch.org/docs/stable', 'zennit': 'https://zennit.readthedocs.io/en/latest'}.items()}
intersphinx_timeout = 5

# The words in the type of a parameter that become links: numpydoc's own that are no functions or classes are left out,
# since links to headings and terms need the whole inventory.
OTHERS = [line.split()[0] for path in INVENTORIES.iterdir() for line in path.read_text().splitlines()[3:]]
numpydoc_xref_aliases = {
    **{word: word for word, link in DEFAULT_LINKS.items() if link.startswith((':ref:', ':term:'))},
    **{name: f':obj:`{name}`' for name in OTHERS},
    'sequence': ':obj:`sequence <collections.abc.Sequence>`', 'iterable': ':obj:`iterable <collections.abc.Iterable>`',
    'mapping': ':obj:`mapping <collections.abc.Mapping>`',
    **{name.rpartition('.')[2]: name for names in public_names().values() for name in names}}


def entry(name: str, value: Any) -> list[str]:
    '''The directive that documents one public object.'''
    if isinstance(value, ModuleType):
        return [f'.. py:module:: {name}', '', *(inspect.getdoc(value) or '').split('\n'), '']
    if isinstance(value, type):
        return [f'.. autoclass:: {name}', '   :members:', '']
    if isinstance(value, FunctionType):
        return [f'.. autofunction:: {name}', '']
    return [f'.. py:data:: {name}', '', f'   In annotations, ``{value}``.', '']


class RoomDirective(SphinxDirective):
    '''``.. room:: planning`` documents all public names of a room, as its ``__all__`` lists them.'''

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        '''Write the directives of the room's names, and parse them.'''
        (room,) = self.arguments
        if room not in (known := public_names()):
            raise self.error(f'there is no room {room!r} with public names; there are {", ".join(known)}.')
        module = sys.modules[f'{PACKAGE}.{room}']
        lines = [*(inspect.getdoc(module) or '').split('\n'), '']
        for name, value in known[room].items():
            lines += entry(name, value)
        return self.parse_text_to_nodes('\n'.join(lines))


def check_pages(app: Sphinx) -> None:
    '''Refuse to build a reference that leaves out a room.'''
    missing = [room for room in public_names() if not (HERE / 'api' / f'{room}.rst').exists()]
    if missing:
        raise RuntimeError(f'docs/api has no page for {", ".join(missing)}: add one, as for the other rooms.')


def space_types(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    '''Write ``name : type`` for numpydoc where a docstring has ``name: type``.'''
    lines[:] = spaced('\n'.join(lines)).split('\n')


def skip_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    '''Leave out the fields of named tuples, which the docstring of the class lists.'''
    return True if type(obj).__name__ == '_tuplegetter' else None


def setup(app: Sphinx) -> dict[str, bool]:
    '''Register the directive and the changes to docstrings, which come before numpydoc's.'''
    app.add_directive('room', RoomDirective)
    app.connect('builder-inited', check_pages)
    app.connect('autodoc-process-docstring', space_types, priority=100)
    app.connect('autodoc-skip-member', skip_fields)
    return {'parallel_read_safe': True}
