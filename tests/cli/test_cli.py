'''``zennit-prune inspect`` and ``zennit-prune run``, as typed.'''
from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import click
import images
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import zennit_prune as zp
from zennit_prune.cli._cli import COMMANDS, main
from zennit_prune.cli._images import Images, find_images, preparation
from zennit_prune.cli._sources import Source

pytest.importorskip('jinja2')
INSPECTED = {'plan.json', 'relevance.safetensors', 'heatmaps.png', 'report.html'}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    '''A folder with nets.py and photos/, to be in.'''
    images.network_file(tmp_path)
    images.image_folder(tmp_path / 'photos')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(*arguments: str, network: str = 'nets.py:colours', folder: str = 'photos',
          prepared: bool = True) -> Result:
    command, *rest = arguments
    return CliRunner().invoke(main, [command, network, folder, *(images.PREPARED if prepared else []), *rest])


def fails(result: Result, status: int, text: str) -> None:
    assert result.exit_code == status and isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ''
    last = result.stderr.splitlines()[-1]
    assert last.startswith('Error: ') and text in last


def test_inspect_removes_nothing_and_writes_what_it_says(here: Path) -> None:
    result = typed('inspect', '--flops', '0.5', '--per-class', '2', '--out', 'out/deep')
    assert result.exit_code == 0, result.stderr
    out = here / 'out' / 'deep'
    assert {path.name for path in out.iterdir()} == INSPECTED and list((here / 'out').iterdir()) == [out]
    for word in ('group', 'accuracy, as it would be', 'no references', 'wrote out/deep/plan.json'):
        assert word in result.stdout
    assert 'users print' not in result.stdout and 'users print' in result.stderr
    assert 'classes: blue = output 0, green = output 1, red = output 2' in result.stderr
    assert 'Warning' not in result.stderr.replace('Warning: the references show', '')
    Image.open(out / 'heatmaps.png').verify()
    page = (out / 'report.html').read_text()
    assert 'zennit-prune inspect nets.py:colours photos' in page and '12 images that are no references' in page
    network = runpy.run_path('nets.py')['colours']().eval()
    plan = zp.Plan.load(out / 'plan.json', zp.trace(network, torch.zeros(1, 3, 16, 16)))
    assert plan.removed


def test_run_does_what_the_library_does(here: Path) -> None:
    result = typed('run', '--flops', '0.5', '--per-class', '2', '--json', '--out', 'out', '--repair', 'refit')
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert {path.name for path in (here / 'out').iterdir()} == {*INSPECTED, 'small.safetensors'}
    network = runpy.run_path('nets.py')['colours']().eval()
    prepare = preparation(Source.parse('nets.py:colours'), network, 16, None, (0.5,) * 3, (0.25,) * 3)
    found = find_images(Path('photos'))
    every = Images(found.files, prepare, found.labels)
    pruner = zp.Pruner(network, None, torch.zeros(1, 3, 16, 16))
    plan = zp.Plan.load('out/plan.json', pruner.graph)
    assert facts['removed'] == {name: list(positions) for name, positions in plan.removed.items()}
    small = zp.load(network, 'out/small.safetensors').eval()
    assert zp.cost(small, torch.zeros(1, 3, 16, 16)).flops == facts['after']['flops'] <= facts['before']['flops'] / 2
    # the references are what split() draws, and all others are measured
    from zennit_prune.cli._images import split
    drawn, rest = split(found, 2, 1000, 0)
    batch = torch.stack([every[number][0] for number in drawn]), torch.tensor([every[number][1] for number in drawn])
    relevance = pruner.collect(batch, progress=False)
    assert dict(pruner.plan(relevance, zp.Budget(flops=0.5)).removed) == dict(plan.removed)
    expected = zp.repair(network, plan.apply(network), plan, batch[0], 'refit', progress=False)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value)
    with torch.no_grad():
        right = [int(small(every[number][0][None]).argmax()) == every[number][1] for number in rest]
    assert facts['accuracy']['repaired'] == pytest.approx(sum(right) / len(right))
    assert facts['accuracy']['before'] == 1.0 and facts['measured_on'] == 12 and facts['references'] == 6
    assert facts['classes'] == {'blue': 0, 'green': 1, 'red': 2} and facts['budget'] == {'flops': 0.5}


def test_equal_commands_give_equal_files(here: Path) -> None:
    plans = []
    for out, seed in (('a', '0'), ('b', '0'), ('c', '1')):
        assert typed('inspect', '--params', '0.6', '--per-class', '1', '--criterion', 'random', '--seed', seed, '--out',
                     out).exit_code == 0
        plans.append((here / out / 'plan.json').read_bytes())
    assert plans[0] == plans[1] != plans[2]


def test_an_edited_plan_is_carried_out(here: Path) -> None:
    assert typed('inspect', '--channels', '0.6', '--per-class', '2', '--out', 'a').exit_code == 0
    plan = json.loads((here / 'a' / 'plan.json').read_text())
    plan['removed'] = {'0': [5, 6]}
    (here / 'mine.json').write_text(json.dumps(plan))
    result = typed('run', '--plan', 'mine.json', '--per-class', '2', '--out', 'b', '--json')
    assert json.loads(result.stdout)['removed'] == {'0': [5, 6]}
    fails(typed('run', '--plan', 'mine.json', '--flops', '0.5'), 2, 'exactly one budget')
    fails(typed('run', '--plan', 'mine.json', '--round-to', '4'), 2, '--round-to is for planning')
    fails(typed('run', '--plan', 'none.json'), 1, "there is no plan 'none.json'")
    (here / 'empty.json').write_text(json.dumps({**plan, 'removed': {}}))
    fails(typed('run', '--plan', 'empty.json'), 1, 'removes no channel')


def test_dry_run_writes_nothing(here: Path) -> None:
    before = sorted(here.rglob('*.*'))
    result = typed('run', '--flops', '0.5', '--dry-run', '--per-class', '4')
    assert result.exit_code == 0 and 'would write pruned/small.safetensors' in result.stdout
    assert 'would collect relevance from 12 references' in result.stdout and 'would measure on 6' in result.stdout
    facts = json.loads(typed('inspect', '--flops', '0.5', '--dry-run', '--json').stdout)
    assert facts['dry_run'] is True and 'pruned/report.html' in facts['files']
    assert [path for path in sorted(here.rglob('*.*')) if '__pycache__' not in path.parts] == before


def test_files_are_replaced_only_when_asked(here: Path) -> None:
    (here / 'out').mkdir()
    for name in ('plan.json', 'small.safetensors', 'mine.txt'):
        (here / 'out' / name).write_text('old')
    for more in ([], ['--dry-run']):
        fails(typed('run', '--flops', '0.5', '--out', 'out', *more), 1, 'has plan.json, small.safetensors already')
    assert (here / 'out' / 'plan.json').read_text() == 'old'
    assert typed('run', '--flops', '0.5', '--out', 'out', '--force', '--per-class', '2').exit_code == 0
    assert (here / 'out' / 'mine.txt').read_text() == 'old' != (here / 'out' / 'plan.json').read_text()
    (here / 'file').write_text('')
    fails(typed('inspect', '--flops', '0.5', '--out', 'file'), 2, 'is a file')
    fails(typed('inspect', '--flops', '0.5', '--out', 'file/below'), 1, 'no folder can be made')


def test_mistakes_in_the_command(here: Path) -> None:
    fails(typed('inspect'), 2, 'exactly one budget, --flops, --params, --bytes, --channels, --latency')
    fails(typed('inspect', '--flops', '.5', '--params', '.5'), 2, 'given: --flops, --params')
    fails(typed('inspect', '--flops', '1'), 2, 'Budget(flops=1) says nothing')
    fails(typed('inspect', '--flops', 'half'), 2, "'half' is not a number")
    fails(typed('inspect', '--flops', '.5', '--criterion', 'magic'), 2, "'magic' is not one of")
    fails(typed('inspect', '--flops', '.5', '--mean', 'x'), 2, "'x' is not a number, or three")
    fails(typed('inspect', '--flops', '.5', network='resnet18'), 2, "'resnet18' names no network")
    fails(typed('inspect', '--flops', '.5', '--plan', 'x'), 2, 'No such option')


def test_what_cannot_be_done(here: Path) -> None:
    for arguments, network, text in (
            ((), 'nets.py:broken', 'RuntimeError: no such disk (nets.py, line'),
            ((), 'nets.py:unsuitable', 'returns shape (1, 4, 14, 14) for one image'),
            (('--weights', 'none.pth'), 'nets.py:colours', 'no file of weights'),
            (('--device', 'nowhere'), 'nets.py:colours', '--device nowhere cannot be used here'),
            (('--ignore', 'layer9*'), 'nets.py:colours', 'layer9*'),
            (('--references', '5'), 'nets.py:colours', '--references 5 is for a folder of images without classes'),
            (('--mean', '0', '--std', '1'), 'nets.py:colours', 'does not run with an image of shape (1, 1, 16, 16)'),
            (('--per-class', '2'), 'nets.py:colours', 'out of reach')):
        fails(typed('inspect', '--flops', '0.001', *arguments, network=network), 1, text)
    fails(typed('inspect', '--flops', '0.5', prepared=False), 1, 'the preparation of images for')
    assert not (here / 'pruned').exists()


def test_without_classes(here: Path) -> None:
    images.image_folder(here / 'flat', flat=True)
    result = typed('run', '--flops', '0.5', '--references', '8', '--json', folder='flat')
    facts = json.loads(result.stdout)
    assert facts['classes'] is None and facts['references'] == 8 and facts['measured_on'] == 10
    assert facts['accuracy']['before'] is None and 0 <= facts['same_prediction']['repaired'] <= 1
    assert 'relevance starts at what the network predicts' in result.stderr
    fails(typed('inspect', '--flops', '0.5', '--per-class', '8', folder='flat'), 1, 'needs a sub-folder')
    fails(typed('inspect', '--flops', '0.5', '--classes', 'numbers', folder='flat'), 1, 'needs a sub-folder')
    result = typed('inspect', '--flops', '0.5', '--classes', 'none', '--json', '--out', 'b', '--per-class', '2')
    assert json.loads(result.stdout)['classes'] is None


def test_a_single_logit_tells_two_folders_apart(here: Path) -> None:
    (here / 'photos' / 'green').rename(here / 'other')
    result = typed('run', '--flops', '0.6', '--per-class', '2', '--json', network='nets.py:redder')
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts['accuracy']['before'] == 1 and facts['accuracy']['repaired'] == 1
    assert 'classes: blue = output 0, red = output 1' in result.stderr


def test_folders_of_the_wrong_class_are_noticed(here: Path) -> None:
    arguments = ['inspect', '--flops', '0.5', '--per-class', '2', '--json']
    assert not [text for text in json.loads(typed(*arguments, '--out', 'a').stdout)['warnings'] if 'folders' in text]
    (here / 'classes.txt').write_text('red\nblue\ngreen\n')
    facts = json.loads(typed(*arguments, '--out', 'b', '--classes', 'classes.txt').stdout)
    assert facts['accuracy']['before'] == 0
    assert any("e.g. output 0 for 'blue', which is said to be output 1" in text for text in facts['warnings'])


def test_all_images_as_references_leave_none_to_measure(here: Path) -> None:
    result = typed('inspect', '--flops', '0.5', '--per-class', '50', '--json')
    facts = json.loads(result.stdout)
    assert facts['measured_on'] == 0 and facts['accuracy']['before'] is None
    assert any('no image is left to measure on' in text for text in facts['warnings'])


def test_random_weights_are_said_to_be(here: Path) -> None:
    result = typed('inspect', '--params', '0.9', '--outputs', '3', '--size', '32', '--json', '--dry-run',
                   network='torchvision:resnet18', prepared=False)
    facts = json.loads(result.stdout)
    assert facts['weights'] == 'random' and 'download.pytorch.org' in facts['warnings'][0]
    assert 'ResNet18_Weights' in facts['preparation'] and facts['classes'] == {'blue': 0, 'green': 1, 'red': 2}


def test_weights_from_a_file(here: Path) -> None:
    network = runpy.run_path('nets.py')['colours']()
    with torch.no_grad():
        network[-1].bias.copy_(torch.tensor([0., 0., 1e3]))
    torch.save(network.state_dict(), 'w.pth')
    result = typed('inspect', '--flops', '0.5', '--per-class', '2', '--weights', 'w.pth', '--json')
    assert json.loads(result.stdout)['accuracy']['before'] == pytest.approx(1 / 3)


def test_without_jinja(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'jinja2', None)
    for more in ([], ['--dry-run']):
        result = typed('inspect', '--flops', '0.5', '--per-class', '2', *more)
        fails(result, 1, "pip install 'zennit-prune[report]'")
        assert 'collecting' not in result.stderr  # said before the work, not after
    result = typed('inspect', '--flops', '0.5', '--per-class', '2', '--no-report')
    assert result.exit_code == 0
    assert {path.name for path in (here / 'pruned').iterdir()} == INSPECTED - {'report.html'}


def test_help_shows_examples_and_warns_of_executing_code() -> None:
    for command in ('inspect', 'run'):
        text = CliRunner().invoke(main, [command, '--help']).stdout
        assert f'zennit-prune {command} torchvision:resnet18 photos' in text and 'is executed' in text


def test_help_and_mistyped_commands_do_not_import_torch() -> None:
    for arguments, status, text in ((['--help'], 0, 'inspect'), (['--version'], 0, zp.__version__),
                                    (['inspct'], 2, "did you mean 'inspect'?"), ([], 2, 'Prune networks')):
        code = ('import sys; from zennit_prune.cli import main\n'
                'try: main(sys.argv[1:])\n'
                'finally: assert "torch" not in sys.modules and "zennit" not in sys.modules')
        found = subprocess.run([sys.executable, '-c', code, *arguments], capture_output=True, text=True)
        assert text in found.stdout + found.stderr and found.returncode == status, found.stderr


def test_help_has_the_first_sentence_of_each_command() -> None:
    context = click.Context(main)
    for name, line in COMMANDS.items():
        command = main.get_command(context, name)
        assert command is not None and (command.help or '').splitlines()[0] == line


def started(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, 'PYTHONPATH': str(Path(zp.__file__).parents[1]), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, '-c', code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment)


def test_as_a_process(here: Path) -> None:
    code = 'from zennit_prune.cli._cli import main; main()'
    with started(code, 'run', 'nets.py:colours', 'photos', *images.PREPARED, '--flops', '0.5', '--per-class', '2',
                 '--json') as process:
        output, progress = process.communicate(timeout=120)
    assert process.returncode == 0, progress
    assert json.loads(output)['command'] == 'run' and 'collecting relevance' in progress
    assert {path.name for path in (here / 'pruned').iterdir()} == {*INSPECTED, 'small.safetensors'}
    with started(code, 'run', 'nets.py:colours', 'photos', '--flops', '0.5') as process:
        output, progress = process.communicate(timeout=120)
    assert (process.returncode, output) == (1, '') and 'Traceback' not in progress


HANGS = '''
import signal
import time
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it, and so would we
from zennit_prune.cli import _commands as commands
from zennit_prune.cli._cli import main


def save(network, plan, path):
    path.write_text('half of it')
    print('NOW', file=sys.stderr, flush=True)
    time.sleep(100)


commands.save = save
main()
'''


@pytest.mark.parametrize('end', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_whoever_is_killed_leaves_whole_files_only(here: Path, end: signal.Signals) -> None:
    (here / 'pruned').mkdir()
    (here / 'pruned' / 'plan.json').write_text('old')
    with started(HANGS, 'run', 'nets.py:colours', 'photos', *images.PREPARED, '--flops', '0.5', '--per-class', '2',
                 '--force') as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line == 'NOW\n':
                break
        process.send_signal(end)
        process.wait(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 1}[end]
    assert [(path.name, path.read_text()) for path in (here / 'pruned').iterdir()] == [('plan.json', 'old')]
    assert len(list(here.glob('pruned.unfinished-*'))) == (end == signal.SIGKILL)
