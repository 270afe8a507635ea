'''The notebooks: the first runs, all keep what they put out, and none says where it ran.'''
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip('nbformat')
pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')
FOLDER = Path(__file__).resolve().parents[2] / 'notebooks'
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))


def executed(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(FOLDER / 'execute.py'), *arguments], capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **environment}, timeout=400)


def test_the_first_runs() -> None:
    pytest.importorskip('sklearn')
    pytest.importorskip('matplotlib')
    before = NOTEBOOKS[0].read_bytes()
    result = executed('--check', str(NOTEBOOKS[0]))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('1_quickstart.ipynb: ') and NOTEBOOKS[0].read_bytes() == before


def test_what_needs_data_is_skipped_and_says_so() -> None:
    result = executed('--check', str(FOLDER / '2_inspect.ipynb'), ZENNIT_PRUNE_DATA='')
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('2_inspect.ipynb: skipped; set ZENNIT_PRUNE_DATA')


@pytest.mark.parametrize('code, said', [
    ('import os; print(os.path.expanduser("~") + "/x")', 'puts out the path'),
    ('raise ValueError("no such channel")', 'no such channel')])
def test_a_notebook_that_fails_or_tells_paths_is_refused(tmp_path: Path, code: str, said: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    path = tmp_path / 'some.ipynb'
    nbformat.write(notebook, path)
    before = path.read_bytes()
    result = executed(str(path))
    assert result.returncode != 0 and said in result.stderr and path.read_bytes() == before


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
    assert len(path.read_bytes()) < 1_000_000
    assert any('image/png' in output.get('data', {}) for output in outputs)
    assert not any(output.output_type == 'error' or output.get('name') == 'stderr' for output in outputs)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == 'code')
