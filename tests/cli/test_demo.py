'''The demo and the command line.'''
from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import zennit_prune as zp
from zennit_prune.cli import _demo as demo
from zennit_prune.cli._cli import main


def test_demo_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip('sklearn')
    folder = tmp_path / 'out'
    plan = demo.run(folder, epochs=2)
    output = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        'heatmaps.png', 'plan.json', 'small.safetensors', 'original.safetensors'}
    for word in ('accuracy', 'parameters', 'FLOPs', 'bytes on disk', 'latency', 'blocks.0.conv1'):
        assert word in output
    Image.open(folder / 'heatmaps.png').verify()
    assert json.loads((folder / 'plan.json').read_text())['removed'].keys() == plan.removed.keys()
    small = zp.load(demo.DigitNet(), folder / 'small.safetensors')
    example = demo.load_digits()[2][:1]
    assert zp.cost(small, example).flops <= 0.5 * zp.cost(demo.DigitNet(), example).flops


def test_command_runs_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(demo, 'run', asked.append)
    assert CliRunner().invoke(main, ['demo', '--out', str(tmp_path / 'here')]).exit_code == 0
    assert asked == [tmp_path / 'here']


def test_command_reports_errors_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise zp.PruneError('no digits')

    monkeypatch.setattr(demo, 'run', refuse)
    result = CliRunner().invoke(main, ['demo'])
    assert (result.exit_code, result.output) == (1, 'Error: no digits\n')


def test_version() -> None:
    assert zp.__version__ in CliRunner().invoke(main, ['--version']).output


def test_public_names_exist() -> None:
    assert all(hasattr(zp, name) for name in zp.__all__)
