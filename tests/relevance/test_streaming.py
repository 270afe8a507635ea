'''Passes that are interrupted and resumed, and samples that are not finite.'''

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small import apart, chain, composite, images, labels, seeded
from torch import nn
from zennit.attribution import SmoothGrad
from zennit.composites import EpsilonPlus, LayerMapComposite
from zennit.rules import Epsilon

import zennit_prune as zp
from zennit_prune.relevance import _streaming as streaming
from zennit_prune.util._fingerprint import described, fingerprint


class Stopped(Exception):
    '''Ends a pass early.'''


def pruner(model: nn.Module | None = None, rules: Any = None) -> zp.Pruner:
    return zp.Pruner(model or chain(), rules or composite(), images())


def loader(batches: int = 8, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images(3, seed=10 * seed + number), labels(3)) for number in range(batches)]


def stopping(after: int, error: BaseException | None = None) -> Iterator[Any]:
    yield from loader()[:after]
    raise error or Stopped('the loader stops')


def bits(left: zp.Relevance, right: zp.Relevance) -> bool:
    return left.info == right.info and all(
        torch.equal(left[name], right[name]) and torch.equal(left._halves[name], right._halves[name]) for name in left
    )


OPTIONS: dict[str, dict[str, Any]] = {
    'plain': {},
    'classes': {'classes': (0, 2)},
    'smoothgrad': {'attributor': lambda model: SmoothGrad(model, n_iter=3), 'seed': 3},
    'function': {'initial': torch.sigmoid, 'aggregate': 'signed'},
    'predicted': {'target': 'predicted'},
}


# --- checkpoints
@pytest.mark.parametrize('options', OPTIONS)
@pytest.mark.parametrize('error', [Stopped(), KeyboardInterrupt()], ids=['error', 'interrupt'])
def test_a_pass_that_was_interrupted_is_resumed_to_the_bit(tmp_path: Path, error: Any, options: str) -> None:
    path, settings = tmp_path / 'collect', {'progress': False, **OPTIONS[options]}
    expected = pruner().collect(loader(), **settings)
    for after in (3, 5):
        with pytest.raises(type(error)):
            pruner().collect(stopping(after, error), checkpoint=path, **settings)
        assert path.exists()
    assert bits(pruner().collect(loader(), checkpoint=path, **settings), expected)
    assert not list(tmp_path.iterdir())


SCRIPT = '''
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from relevance.test_streaming import loader, pruner, streaming
torch.set_num_threads(1)
streaming.EVERY = 0.0

def slow():
    for number, batch in enumerate(loader(40)):
        print(number, flush=True)
        yield batch
        time.sleep(0.02)

relevance = pruner().collect(slow(), checkpoint=sys.argv[2], progress=False)
relevance.save(sys.argv[3])
'''


def test_a_killed_process_resumes_to_the_bit(tmp_path: Path) -> None:
    path, result = tmp_path / 'collect', tmp_path / 'relevance'
    command = [sys.executable, '-c', SCRIPT, str(Path(__file__).parents[1]), str(path), str(result)]
    for stop in (7, 15):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == stop:
                process.send_signal(signal.SIGKILL)
                break
        process.wait(60)
        process.stdout.close()
        assert process.returncode == -signal.SIGKILL
        with safe_open(path, 'pt') as file:  # what was saved is a whole number of batches
            state = json.loads(file.metadata()['state'])
        assert state['seen'] == sum(state['counts']) == 3 * state['batches'] and state['batches'] in (stop, stop - 1)
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert bits(zp.Relevance.load(result), pruner().collect(loader(40), progress=False))
    assert not path.exists()


def test_checkpoints_are_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, times = tmp_path / 'collect', iter(range(0, 1000, 10))
    monkeypatch.setattr(time, 'monotonic', lambda: next(times))
    seen = []

    def watched() -> Iterator[Any]:
        for batch in loader():
            seen.append(path.stat().st_mtime_ns if path.exists() else None)
            yield batch

    monkeypatch.setattr(streaming, 'EVERY', 25.0)
    pruner().collect(watched(), checkpoint=path, progress=False)
    assert len({stamp for stamp in seen if stamp}) == 2 and seen[:3] == [None] * 3


def test_nothing_is_written_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streaming, 'EVERY', 0.0)
    with pytest.raises(Stopped):
        pruner().collect(stopping(3), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_failed_batch_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    '''A batch with a bad label ends the pass; once it is mended, the pass goes on with it.'''
    path, batches = tmp_path / 'collect', loader()
    batches[4] = (batches[4][0], torch.tensor([0, 9, 1]))
    with pytest.raises(zp.PruneError, match='label 9'):
        pruner().collect(batches, checkpoint=path, progress=False)
    expected = pruner().collect(loader(), progress=False)
    assert bits(pruner().collect(loader(), checkpoint=path, progress=False), expected)


def test_an_interrupt_within_a_batch_leaves_all_of_it_or_nothing(tmp_path: Path) -> None:
    '''Whatever line it hits.'''
    path = tmp_path / 'collect'
    expected, interrupts = pruner().collect(loader(2), progress=False), 0
    for line in range(1, 400, 23):
        left = [line]

        def trace(frame: Any, event: str, argument: Any, left: list[int] = left) -> Any:
            if event == 'line' and frame.f_code.co_filename.endswith(('collect.py', 'sums.py', 'selection.py')):
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
            return trace

        tool = pruner()
        sys.settrace(trace)
        try:
            tool.collect(loader(2), checkpoint=path, progress=False)
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            sys.settrace(None)
        assert bits(pruner().collect(loader(2), checkpoint=path, progress=False), expected)
    assert interrupts > 10


def _interrupted(path: Path, **options: Any) -> None:
    with pytest.raises(Stopped):
        pruner(options.pop('model', None), options.pop('rules', None)).collect(
            stopping(3), checkpoint=path, progress=False, **options
        )


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Path], Any], str]] = {
    'another order': ({}, lambda path: pruner().collect(loader()[::-1], checkpoint=path), 'batch 3 was another'),
    'other batches': ({}, lambda path: pruner().collect(loader(seed=1), checkpoint=path), 'batch 3 was another'),
    'other labels': (
        {},
        lambda path: pruner().collect([(x, y.flip(0)) for x, y in loader()], checkpoint=path),
        'batch 3 was another',
    ),
    'too few batches': ({}, lambda path: pruner().collect(loader(2), checkpoint=path), '3 batches.*yields 2'),
    'another aggregate': ({}, lambda path: pruner().collect(loader(), aggregate='abs', checkpoint=path), 'aggregate'),
    'another initial': ({}, lambda path: pruner().collect(loader(), initial='logit', checkpoint=path), 'initial'),
    'other classes': (
        {'classes': (1, 2)},
        lambda path: pruner().collect(loader(), checkpoint=path),
        r'classes: None and \[1, 2\]',
    ),
    'another seed': (
        {'attributor': SmoothGrad, 'seed': 1},
        lambda path: pruner().collect(loader(), attributor=SmoothGrad, seed=2, checkpoint=path),
        'seed: 2 and 1',
    ),
    'other rules': (
        {},
        lambda path: pruner(rules=composite('epsilon_alpha2_beta1')).collect(loader(), checkpoint=path),
        'composite.*EpsilonAlpha2Beta1.*EpsilonPlus',
    ),
    'rules with other options': (
        {},
        lambda path: pruner(rules=EpsilonPlus(epsilon=0.1)).collect(loader(), checkpoint=path),
        'composite',
    ),
    'other weights': (
        {},
        lambda path: pruner(seeded(chain(), 1)).collect(loader(), checkpoint=path),
        'other weights',
    ),
    'another network': (
        {},
        lambda path: pruner(seeded(nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten(), nn.Linear(5, 4)))).collect(
            loader(), checkpoint=path
        ),
        'different networks',
    ),
    'no folder': (
        {},
        lambda path: pruner().collect(loader(), checkpoint=path.parent / 'missing' / 'file'),
        'no folder',
    ),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_checkpoints_that_do_not_fit_are_refused_and_kept(tmp_path: Path, kind: str) -> None:
    path, (options, action, message) = tmp_path / 'collect', REFUSED[kind]
    _interrupted(path, **options)
    before = path.read_bytes()
    with pytest.raises(zp.PruneError, match=message):
        action(path)
    assert path.read_bytes() == before


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / 'collect'
    pruner().collect(loader(1), progress=False).save(path)
    with pytest.raises(zp.PruneError, match='is no zennit_prune collection'):
        pruner().collect(loader(), checkpoint=path)
    save_file({}, path, {'format': 'zennit_prune collection', 'version': '1', 'state': '{}', 'settings': '{}'})
    with pytest.raises(zp.PruneError, match='damaged'):
        pruner().collect(loader(), checkpoint=path)


def test_collectors_are_saved_loaded_and_merged(tmp_path: Path) -> None:
    tool, batches = pruner(), loader(4)
    whole = tool.collect(batches, progress=False)
    parts = []
    for number, part in enumerate((batches[:2], batches[2:])):
        with tool.collector() as collector:
            for inputs, target in part:
                collector.update(inputs, target)
        collector.save(tmp_path / str(number))
        parts.append(pruner().collector().load(tmp_path / str(number)))
    assert parts[1].sums.batches == 2 and parts[1].samples == 6
    found = parts[0].merge(parts[1]).compute()
    assert all(apart(found[name], whole[name]) <= 1e-12 for name in whole) and found.info == whole.info
    with pytest.raises(zp.PruneError, match='fresh'):
        parts[0].load(tmp_path / '0')


# --- fingerprints
def test_fingerprints_tell_rules_and_functions_apart() -> None:
    def scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda output: factor * output

    different = [
        EpsilonPlus(), EpsilonPlus(epsilon=1e-3), EpsilonPlus(zero_params='bias'), composite('epsilon_gamma_box'),
        scaled(1.0), scaled(2.0), torch.sigmoid, torch.tanh, lambda output: output + 1, lambda output: output + 2,
        Epsilon(1e-6), Epsilon(1e-5), 'one-hot', {'a': torch.ones(2)}, {'a': torch.ones(2, 1)},
        [torch.ones(2), torch.zeros(2)], [torch.zeros(2), torch.ones(2)],
    ]  # fmt: skip
    again = [EpsilonPlus(), EpsilonPlus(epsilon=1e-3), EpsilonPlus(zero_params='bias')]
    names = [described(value) for value in different]
    assert len({str(name) if isinstance(name, str) else fingerprint(name) for name in names}) == len(different)
    assert [described(value) for value in again] == names[:3]
    assert described(scaled(2.0)) == names[5]


def test_fingerprints_are_those_of_another_process() -> None:
    code = (
        f'import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n'
        'from relevance.test_streaming import *\n'
        "print(described(composite('epsilon_gamma_box')), described(OPTIONS['smoothgrad']['attributor']))"
    )
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=60)
    here = f"{described(composite('epsilon_gamma_box'))} {described(OPTIONS['smoothgrad']['attributor'])}"
    assert found.stdout.strip() == here


def test_fingerprints_of_what_holds_itself_end() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert fingerprint(loop) != fingerprint([1, [1]])


# --- what is not finite
BROKEN = [float('nan'), float('inf')]


def broken_loader(value: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches = [(x.clone(), y) for x, y in loader(3)]
    batches[1][0][2, 0, 4, 4] = value
    return batches


@pytest.mark.parametrize('value', BROKEN)
def test_an_input_that_is_not_finite_is_named(value: float) -> None:
    with pytest.raises(zp.PruneError, match=r"sample 5 of the stream \(number 2 of its batch\).*input.*'skip'"):
        pruner().collect(broken_loader(value), progress=False)


class Fragile(nn.Module):
    '''Overflows for inputs that start with a large number, and for these only.'''

    def __init__(self) -> None:
        super().__init__()
        self.inner = chain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * torch.where(x[:, :1, :1, :1] > 50, 1e38, 1.0))


def fragile() -> tuple[zp.Pruner, list[tuple[torch.Tensor, torch.Tensor]]]:
    batches = [(x.clone(), y) for x, y in loader(3)]
    batches[1][0][1, 0, 0, 0] = 100.0
    return pruner(Fragile().eval()), batches


def test_relevance_that_is_not_finite_names_sample_and_overflow() -> None:
    tool, batches = fragile()
    with pytest.raises(zp.PruneError, match=r'sample 4 of the stream \(number 1 .*overflow in mul .*up to 100 '):
        tool.collect(batches, progress=False)


def test_relevance_that_is_not_finite_names_sample_and_group() -> None:
    class Broken(Epsilon):
        '''A rule that overflows in the backward pass only.'''

        def backward(self, module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
            return tuple(None if grad is None else grad * torch.inf for grad in grad_input)

    tool = pruner(rules=LayerMapComposite([(nn.Conv2d, Broken())]))
    with pytest.raises(zp.PruneError, match=r"sample 0 of the stream \(number 0 .*group '\d+'.*finite.*a rule divides"):
        tool.collect(loader(1), progress=False)


@pytest.mark.parametrize('kind', ['input', 'relevance'])
def test_samples_that_are_not_finite_are_left_out(kind: str) -> None:
    tool, batches = fragile() if kind == 'relevance' else (pruner(), broken_loader(float('nan')))
    gone = {'relevance': 1, 'input': 2}[kind]
    rest = [row for row in range(3) if row != gone]
    good = [batches[0], (batches[1][0][rest], batches[1][1][rest]), batches[2]]
    expected = tool.collect(good, progress=False)
    with pytest.warns(zp.PruneWarning, match=f'1 of 9 samples were left out: sample {3 + gone} of the stream'):
        found = tool.collect(batches, nonfinite='skip', progress=False)
    assert found.info == {**expected.info, 'skipped': 1}
    assert all(apart(found[name], expected[name]) <= 1e-6 for name in expected)
    assert found.reliability().groups == pytest.approx(expected.reliability().groups, abs=1e-6)


def test_nothing_is_said_where_nothing_is_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert 'skipped' not in pruner().collect(loader(), nonfinite='skip', progress=False).info


def test_a_batch_that_is_refused_is_not_half_counted() -> None:
    tool, batches = fragile()
    with tool.collector() as collector:
        collector.update(*batches[0])
        before = collector.sums
        with pytest.raises(zp.PruneError):
            collector.update(*batches[1])
        assert collector.sums is before


def test_all_samples_left_out_is_an_error() -> None:
    with pytest.raises(zp.PruneError, match=r'no sample.*sample 0 of the stream.*not finite'):
        pruner().collect([(images() / 0, labels())], nonfinite='skip', progress=False)


def test_left_out_samples_survive_checkpoints_and_merges(tmp_path: Path) -> None:
    batches = broken_loader(float('nan'))
    collectors = []
    for number, part in enumerate((batches[:1], batches[1:])):
        with pruner().collector(nonfinite='skip') as collector:
            for inputs, target in part:
                collector.update(inputs, target)
        collector.save(tmp_path / str(number))
        collectors.append(pruner().collector(nonfinite='skip').load(tmp_path / str(number)))
    with pytest.warns(zp.PruneWarning, match='1 of 9 samples'):
        assert collectors[0].merge(collectors[1]).compute().info['samples'] == 8


def test_a_file_for_each_checkpoint_appears_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / 'collect'
    _interrupted(path)
    before = path.read_bytes()

    def failing(*_: Any) -> None:
        raise OSError('the disk is full')

    monkeypatch.setattr(os, 'replace', failing)
    with pytest.raises(OSError, match='full'):
        pruner().collect(stopping(5), checkpoint=path, progress=False)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
