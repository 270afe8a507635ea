'''Run the notebooks of this folder, or those named, and keep what they put out.

    python notebooks/execute.py [--check] [NOTEBOOK ...]

``--check`` runs them without writing. A notebook that needs data that are not here is skipped, and says so.
'''
from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
LIMIT = 1_000_000  # bytes of a notebook
SECONDS = 600  # for one cell


def execute(path: Path) -> nbformat.NotebookNode:
    '''Run a notebook in its folder. What it puts out must not say where it ran.'''
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, kernel_name='python3', record_timing=False,
                   resources={'metadata': {'path': str(path.parent)}}).execute()
    notebook.metadata['language_info'] = {'name': 'python'}
    text = nbformat.writes(notebook)
    places = {str(HERE.parent), sys.prefix, str(Path.home()), os.environ.get('ZENNIT_PRUNE_DATA', '')} - {'', '/'}
    for place in places:
        if place in text:
            around = text[max(0, text.index(place) - 80):][:240]
            raise SystemExit(f'{path.name} puts out the path {place!r}: see that it does not. It is in ...{around}...')
    if len(text) > LIMIT:
        raise SystemExit(f'{path.name} has {len(text):,} bytes: draw smaller pictures.')
    return notebook


def main(arguments: list[str]) -> None:
    '''Run notebooks one after the other.'''
    os.environ |= {'TQDM_DISABLE': '1', 'PYTHONWARNINGS': 'ignore:IProgress not found'}  # no bars in outputs
    os.environ['PYTHONPATH'] = os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')])
    paths = [Path(argument) for argument in arguments if argument != '--check'] or sorted(HERE.glob('*.ipynb'))
    for path in paths:
        needs = nbformat.read(path, as_version=4).metadata.get('needs')
        if needs and not os.environ.get(needs):
            print(f'{path.name}: skipped, {needs} is not set (README.md here says what it names)')
            continue
        began = time.perf_counter()
        notebook = execute(path)
        if '--check' not in arguments:
            nbformat.write(notebook, path)
        print(f'{path.name}: {time.perf_counter() - began:.0f} s')


if __name__ == '__main__':
    main(sys.argv[1:])
