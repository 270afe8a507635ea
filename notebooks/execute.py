'''Run the notebooks of this folder, or those named, and keep what they put out.

    python notebooks/execute.py [--check] [NOTEBOOK ...]

``--check`` runs them without writing. A notebook that needs data that are not here is skipped, and says so.
'''
from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
DATA = 'ZENNIT_PRUNE_DATA'
LIMIT = 1_000_000  # bytes of a notebook
SECONDS = 600  # for one cell


def execute(path: Path) -> nbformat.NotebookNode:
    '''Run a notebook in its folder. What it puts out must not say where it ran.'''
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, kernel_name='python3', record_timing=False, coalesce_streams=True,
                   resources={'metadata': {'path': str(path.parent)}}).execute()
    notebook.metadata['language_info'] = {'name': 'python'}
    places = [str(HERE.parent), sys.prefix, str(Path.home()), tempfile.gettempdir(), os.environ.get(DATA, '/')]
    for text in _texts(notebook):
        for place in places:
            if len(place) > 1 and place in text:
                raise SystemExit(f'{path.name} puts out the path {place!r}: see that it does not.\n{text}')
    if len(nbformat.writes(notebook)) > LIMIT:
        raise SystemExit(f'{path.name} has more than {LIMIT:,} bytes: draw smaller pictures.')
    return notebook


def _texts(notebook: nbformat.NotebookNode) -> Iterator[str]:
    for cell in notebook.cells:
        for output in cell.get('outputs', ()):
            yield output.get('text', '')
            yield from (text for kind, text in output.get('data', {}).items() if kind.startswith('text/'))


def main(arguments: list[str]) -> None:
    '''Run notebooks one after the other.'''
    os.environ |= {'TQDM_DISABLE': '1', 'PYTHONWARNINGS': 'ignore:IProgress not found'}  # no bars in outputs
    os.environ['PYTHONPATH'] = os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')])
    paths = [Path(argument) for argument in arguments if argument != '--check'] or sorted(HERE.glob('*.ipynb'))
    for path in paths:
        if nbformat.read(path, as_version=4).metadata.get('needs') == DATA and not os.environ.get(DATA):
            print(f'{path.name}: skipped; set {DATA} to the folder that its first cell describes')
            continue
        began = time.perf_counter()
        notebook = execute(path)
        if '--check' not in arguments:
            nbformat.write(notebook, path)
        print(f'{path.name}: {time.perf_counter() - began:.0f} s')


if __name__ == '__main__':
    main(sys.argv[1:])
