'''Pruning in one call and step by step: what is removed, kept, carried on, drawn, stopped and resumed.'''

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import Functional, Mixed, Residual, chain, images, labels, lived_in, same, seeded, snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import zennit_prune as zp
from zennit_prune.cli._demo import DigitNet
from zennit_prune.pipeline import _step as steps
from zennit_prune.pipeline._checkpoint import FORMAT
from zennit_prune.repairs import _references as references
from zennit_prune.repairs._references import References
from zennit_prune.util._files import read_tensors, write_tensors

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    'chain': chain,
    'residual': lambda: seeded(Residual(8)),
    'functional': lambda: seeded(Functional()),
    'mixed': lambda: seeded(Mixed()),
}
QUIET: dict[str, Any] = {'progress': False}


@pytest.fixture(autouse=True)
def _few_classes() -> Iterator[None]:
    '''Untrained networks predict one class.'''
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'the references show', zp.PruneWarning)
        yield


def data(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return images(count), labels(count)


def pruner(network: nn.Module | None = None) -> zp.Pruner:
    return zp.Pruner(chain() if network is None else network, None, images(1))


def equal(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def doubled(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)


# --- what is removed
@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('criterion', ['relevance', 'l1'])
def test_the_plan_leads_from_the_original_to_the_result(name: str, criterion: str) -> None:
    network = NETWORKS[name]()
    result = pruner(network).iterate(data(), zp.Budget(flops=0.35), 0.1, criterion, 'none', **QUIET)
    assert equal(result.plan.apply(network), result.model)
    left = zp.cost(result.model, images(1)).flops / zp.cost(network, images(1)).flops
    assert left == pytest.approx(result.history[-1].left['flops']) and left <= 0.35
    assert 3 <= len(result.history) - 1 <= 7 and result.stopped == 'Budget(flops=0.35) is reached.'


@pytest.mark.parametrize('unit', ['flops', 'params', 'bytes', 'channels'])
def test_steps_are_shares_of_the_original_in_the_unit_of_the_budget(unit: str) -> None:
    one = zp.Pruner(seeded(DigitNet()), None, images(1)[:, :1])
    result = one.iterate((), zp.Budget(**{unit: 0.42}), 0.1, 'l1', 'none', **QUIET)
    limits = [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42]
    assert len(result.history) == len(limits)
    assert all(limit - 0.05 < step.left[unit] <= limit for step, limit in zip(result.history, limits))


def test_prune_does_what_its_parts_do() -> None:
    one = pruner(NETWORKS['residual']())
    result = one.prune(data(), zp.Budget(flops=0.5), repair='none', **QUIET)
    relevance = one.collect(data(), **QUIET)
    assert all(torch.equal(result.relevance[name], relevance[name]) for name in relevance)
    plan = one.plan(relevance, zp.Budget(flops=0.5))
    assert result.plan == plan and result.plan.reliability == plan.reliability is not None
    assert equal(plan.apply(one.model), result.model)
    assert [step.number for step in result.history] == [0, 1]
    options: dict[str, Any] = {'aggregate': 'signed', 'classes': (0, 1), 'per_cost': False, 'min_channels': 3}
    result = one.prune(data(), zp.Budget(flops=0.6), repair='none', **QUIET, **options)
    relevance = one.collect(data(), aggregate='signed', classes=(0, 1), **QUIET)
    assert result.plan == one.plan(relevance, zp.Budget(flops=0.6), min_channels=3, per_cost=False)
    seeds = [one.prune((), zp.Budget(flops=0.5), 'random', 'none', seed=seed, **QUIET) for seed in (0, 1)]
    assert seeds[0].plan == one.plan(one.collect((), 'random', seed=0), zp.Budget(flops=0.5)) != seeds[1].plan


def test_the_one_call_returns_the_repaired_network() -> None:
    network = NETWORKS['residual']()
    repaired, plain = (zp.prune(network, None, data(), zp.Budget(flops=0.5), repair=repair, **QUIET)
                       for repair in ('refit', 'none'))  # fmt: skip
    result = pruner(network).prune(data(), zp.Budget(flops=0.5), repair='refit', **QUIET)
    assert equal(repaired, result.model) and not equal(repaired, plain)
    assert equal(plain, result.plan.apply(network))


def test_every_step_scores_the_network_as_it_is() -> None:
    widths: list[dict[str, int]] = []

    def score(graph: zp.graph.ChannelGraph, model: nn.Module, loader: Any) -> zp.Relevance:
        widths.append({group.name: group.size for group in graph.groups})
        return zp.Relevance({group.name: torch.arange(group.size) for group in graph.groups})

    result = pruner().iterate(data(), zp.Budget(channels=0.6), 0.1, score, 'none', **QUIET)
    assert len(widths) == len(result.history) - 1
    left = [sum(size.values()) / sum(widths[0].values()) for size in widths]
    assert left == pytest.approx([step.left['channels'] for step in result.history[:-1]])


@pytest.mark.parametrize('name', NETWORKS)
def test_scores_return_to_the_channels_they_belong_to(name: str) -> None:
    '''A filter that fine-tuning silences is the next to go, whatever went before it.'''
    network = NETWORKS[name]()
    one = pruner(network)
    group = max(one.graph.groups, key=lambda group: group.size)
    member = next(member for member in group.members if member.role == 'producer')
    first = one.prune((), zp.Budget(channels=0.8), 'l1', 'none', per_cost=False, **QUIET).plan
    position = [i for i in range(group.size) if i not in first.removed.get(group.name, ())][-1]
    gone = {int(i) for i in member.index[list(first.removed.get(group.name, ()))].reshape(-1)}
    kept = [i for i in range(network.get_parameter(member.parameter).shape[0]) if i not in gone]
    done: list[int] = []

    def silence(small: nn.Module) -> None:
        if not done:
            with torch.no_grad():
                for index in member.index[position].reshape(-1):
                    for layer in group.layers('producer'):
                        weight = small.get_parameter(f'{layer}.weight')
                        weight[kept.index(int(index))] *= 1e-9
        done.append(1)

    result = one.iterate((), zp.Budget(channels=0.65), 0.2, 'l1', 'none', silence, per_cost=False, **QUIET)
    assert len(done) == 2
    assert position in result.plan.removed[group.name] and position not in first.removed.get(group.name, ())


@pytest.mark.parametrize('name', NETWORKS)
def test_values_are_carried_on(name: str) -> None:
    network = NETWORKS[name]()
    one = pruner(network)
    result = one.iterate(data(), zp.Budget(channels=0.6), 0.15, repair='none', finetune=doubled, **QUIET)
    plain, factor = result.plan.apply(network), 2 ** (len(result.history) - 1)
    assert factor >= 8
    for parameter, other in zip(plain.parameters(), result.model.parameters()):
        assert torch.equal(factor * parameter, other)


# --- repair and fine-tuning
def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def repair(model: nn.Module, small: nn.Module, plan: zp.Plan, data: Any, method: str, progress: bool,
               **_: Any) -> nn.Module:
        calls.append((model, plan, torch.cat([inputs for inputs, _ in data]), method, progress))
        return zp.repair(model, small, plan, data, 'none')

    monkeypatch.setattr(steps, 'repaired', repair)
    return calls


def test_every_repair_aims_at_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, network = spied(monkeypatch), chain()
    result = pruner(network).iterate(data(), zp.Budget(flops=0.5), 0.2, **QUIET)
    assert len(calls) == len(result.history) - 1 >= 2
    for model, plan, inputs, method, progress in calls:
        assert model is network and method == 'refit' and not progress
        assert torch.equal(inputs, images(12))
        assert all(set(positions) <= set(result.plan.removed[name]) for name, positions in plan.removed.items())
    assert calls[-1][1].removed == result.plan.removed


@pytest.mark.parametrize('kind', ['prune', 'iterate', 'call'])
def test_a_generator_loses_no_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, budget = spied(monkeypatch), zp.Budget(flops=0.5)
    pairs = list(zip(images(10).split(3), labels(10).split(3)))
    found = []
    for loader in (pairs, (pair for pair in pairs)):
        one = pruner()
        if kind == 'call':
            found.append(zp.prune(one.model, None, loader, budget, **QUIET))
        elif kind == 'prune':
            found.append(one.prune(loader, budget, **QUIET).model)
        else:
            found.append(one.iterate(loader, budget, 0.2, **QUIET).model)
    assert equal(*found) and all(torch.equal(call[2], images(10)) for call in calls)


def test_criteria_that_look_at_no_data_leave_it_to_the_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    pruner().prune((pair for pair in [data()]), zp.Budget(flops=0.5), 'l1', **QUIET)
    assert torch.equal(calls[0][2], images(12))
    with pytest.raises(zp.PruneError, match='no reference to repair with'):
        pruner().prune([], zp.Budget(flops=0.5), 'l1', **QUIET)


@pytest.mark.parametrize('wrap', [lambda network: None, lambda network: network, nn.DataParallel])
def test_finetune_may_train_in_place_or_return(wrap: Callable[[nn.Module], Any]) -> None:
    flags = []

    def tune(network: nn.Module) -> Any:
        flags.append(network.training)
        doubled(network.train())
        network.extra = 1  # type: ignore[assignment]
        return wrap(network)

    result = pruner().iterate(data(), zp.Budget(flops=0.5), 0.2, repair='none', finetune=tune, **QUIET)
    assert not any(flags) and type(result.model) is nn.Sequential and not hasattr(result.model, 'extra')
    assert not any(module.training for module in result.model.modules())
    expected = result.plan.apply(chain())
    doubled(expected)
    assert torch.equal(result.model[0].weight, expected[0].weight * 2 ** (len(flags) - 1))


WRONG: dict[str, tuple[Any, str]] = {
    'type': (lambda network: 3, 'finetune returned a int: return the network, or None'),
    'shape': (lambda network: chain(), "not the pruned network any more: '0.weight' has shape"),
    'names': (lambda network: nn.Sequential(network), "'0.weight' is missing"),
}


@pytest.mark.parametrize('case', WRONG)
def test_finetune_may_not_change_the_structure(case: str) -> None:
    with pytest.raises(zp.PruneError, match=WRONG[case][1]):
        pruner().iterate(data(), zp.Budget(flops=0.5), 0.25, repair='none', finetune=WRONG[case][0], **QUIET)


@pytest.mark.parametrize('repair', ['none', 'batchnorm'])
def test_the_network_survives(repair: str, tmp_path: Path) -> None:
    network = lived_in(NETWORKS['residual']())
    before, states = snapshot(network), (random.getstate(), np.random.get_state()[1].copy())

    def meddle(small: nn.Module) -> float:
        doubled(small.train())
        return random.random() + np.random.rand() + float(torch.rand(()))

    def trained(small: nn.Module) -> None:
        meddle(small)
        small.requires_grad_(False)

    result = pruner(network).iterate(data(), zp.Budget(flops=0.5), 0.2, repair=repair, finetune=trained,
                                     evaluate=meddle, checkpoint=tmp_path / 'run', **QUIET)  # fmt: skip
    pruner(network).prune(data(), zp.Budget(flops=0.5), repair=repair, **QUIET)
    assert same(before, snapshot(network))
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    of = {name: module.training for name, module in network.named_modules()}
    assert {name: module.training for name, module in result.model.named_modules()} == of
    frozen = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in result.model.named_parameters()} == frozen


# --- when it ends
def test_it_stops_before_the_least_score() -> None:
    values = iter([0.9, 0.89, 0.88, 0.7, 0.95])
    with pytest.warns(zp.PruneWarning, match=r'not reached: step 3 would leave \d\d\.\d% of the flops and fall to 0.7'):
        result = pruner().iterate(data(), zp.Budget(flops=0.3), 0.1, repair='none',
                                  evaluate=lambda network: next(values), min_score=0.8, **QUIET)  # fmt: skip
    assert [step.evaluation for step in result.history] == [0.9, 0.89, 0.88]
    assert 'below min_score=0.8' in result.stopped and result.stopped in str(result)
    assert equal(result.plan.apply(chain()), result.model)
    left = zp.cost(result.model, images(1)).flops / zp.cost(chain(), images(1)).flops
    assert left == pytest.approx(result.history[-1].left['flops'])


@pytest.mark.parametrize('bad', [0.1, float('nan')])
def test_a_first_step_below_the_least_score_leaves_the_original(bad: float) -> None:
    values = iter([0.9, bad])
    with pytest.warns(zp.PruneWarning, match='step 1 would'):
        result = pruner().iterate(data(), zp.Budget(flops=0.3), 0.1, repair='none',
                                  evaluate=lambda network: next(values), min_score=0.8, **QUIET)  # fmt: skip
    assert not result.plan.removed and equal(result.model, chain()) and len(result.relevance)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    'budget': ({'budget': 0.5}, 'a Budget is needed, not 0.5'),
    'too much': ({'budget': zp.Budget(flops=10**9)}, 'leaves the network as it is'),
    'out of reach': ({'budget': zp.Budget(flops=0.001)}, 'out of reach'),
    'step 0': ({'step': 0}, 'step=0: a step takes a share'),
    'step 2': ({'step': 2.0}, 'step=2.0: a step takes a share'),
    'step text': ({'step': 'all'}, "step='all': a step takes a share"),
    'repair': ({'repair': 'hope'}, "repair='hope' is unknown: use one of 'refit'"),
    'min_score': ({'min_score': 0.9}, 'min_score=0.9 needs evaluate='),
    'min_score too high': ({'min_score': 0.9, 'evaluate': lambda network: 0.5}, 'the network itself is at 0.5'),
    'evaluate': ({'evaluate': lambda network: None}, 'evaluate returned None: return a number'),
    'criterion': ({'criterion': 'luck'}, "criterion='luck' is unknown"),
    'folder': ({'checkpoint': '/nowhere/at/all'}, "no folder for '/nowhere/at/all'"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_honoured_is_refused_before_the_first_step(case: str) -> None:
    options, message = REFUSED[case]
    tuned: list[nn.Module] = []
    with pytest.raises(zp.PruneError, match=message):
        pruner().iterate(**{'loader': data(), 'budget': zp.Budget(flops=0.5), 'repair': 'none', 'finetune':
                            tuned.append, **QUIET, **options})  # fmt: skip
    assert not tuned


def test_one_call_takes_all_options() -> None:
    x = images(8)
    kept = zp.prune(chain(), None, [x], zp.Budget(flops=0.7), repair='none', target='predicted', round_to=2, **QUIET)
    predicted = chain().eval()(x).argmax(1)
    assert equal(kept, pruner().prune((x, predicted), zp.Budget(flops=0.7), repair='none', round_to=2, **QUIET).model)


def test_a_dataset_is_to_be_wrapped() -> None:
    with pytest.raises(zp.PruneError, match=r'a TensorDataset does not\. Wrap it in a torch'):
        pruner().prune(TensorDataset(*data()), zp.Budget(flops=0.7), **QUIET)  # type: ignore[arg-type]


# --- what is to be read afterwards
def test_history_is_told_saved_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[zp.pipeline.Step] = []
    result = pruner().iterate(data(), zp.Budget(flops=0.5), 0.2, repair='none', callback=seen.append,
                              evaluate=lambda network: float(len(network)), **QUIET)  # fmt: skip
    assert tuple(seen) == result.history and [step.number for step in seen] == list(range(len(seen)))
    assert seen[0].reliability is None and all(-1 <= step.reliability <= 1 for step in seen[1:])  # type: ignore[operator]
    assert all(step.evaluation == 12 and step.seconds > 0 for step in seen)
    assert all(value == 1 for value in seen[0].left.values())
    result.save_history(tmp_path / 'history.json')
    saved = json.loads((tmp_path / 'history.json').read_text())
    assert tuple(zp.pipeline.Step(**step) for step in saved['history']) == result.history
    assert saved['stopped'] == result.stopped
    for one in (result, pruner().prune(data(), zp.Budget(flops=0.5), 'l1', 'none', **QUIET)):
        figure = one.plot(tmp_path / 'history.png')
        Image.open(tmp_path / 'history.png').verify()
        panels = [axes.get_legend().get_texts()[0].get_text() for axes in figure.axes]
        assert panels == ['flops left', *['evaluation', 'reliability'] * (one is result)]
        assert len(one.plot().axes) == len(panels)
        assert 'reliability' in str(one) and 'steps: Budget(flops=0.5) is reached' in repr(one)
    with pytest.raises(zp.PruneError, match='no folder for'):
        result.plot(tmp_path / 'nowhere' / 'history.png')
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(zp.PruneError, match=r"pip install 'zennit-prune\[plot\]'"):
        result.plot(tmp_path / 'history.png')


# --- interruptions
class Shuffled:
    '''Batches in an order drawn anew in every pass, with noise.'''

    def __iter__(self) -> Iterator[Any]:
        x, target = data(16)
        for index in torch.randperm(16).split(4):
            print('batch', flush=True)
            yield x[index] + 0.1 * torch.randn_like(x[index]) + random.random() + np.random.rand(), target[index]


def noisy(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter) * random.random() * np.random.rand())


def run(folder: Path | None = None, **options: Any) -> zp.pipeline.Result:
    settings: dict[str, Any] = {'repair': 'bias', 'finetune': noisy, 'evaluate': lambda network: network(
        images(2)).detach().abs().mean() + torch.rand(()), **QUIET, **options}  # fmt: skip
    one = zp.Pruner(NETWORKS['residual'](), None, images(1))
    return one.iterate(Shuffled(), zp.Budget(flops=0.4), 0.1, checkpoint=folder, **settings)


def alike(left: zp.pipeline.Result, right: zp.pipeline.Result) -> bool:
    told = [[(step.number, step.left, step.evaluation, step.reliability) for step in one.history]
            for one in (left, right)]  # fmt: skip
    return (equal(left.model, right.model) and left.plan.removed == right.plan.removed and told[0] == told[1]
            and all(torch.equal(left.relevance[name], right.relevance[name]) for name in right.relevance)
            and left.relevance.info == right.relevance.info)  # fmt: skip


class Stopped(Exception):
    '''Ends a run early.'''


def stop(step: zp.pipeline.Step) -> None:
    if step.number == 2:
        raise Stopped


@pytest.mark.parametrize('criterion', ['relevance', 'l1', 'random', 'auto'])
def test_a_run_that_was_interrupted_is_resumed_to_the_bit(criterion: str, tmp_path: Path) -> None:
    folder, seen = tmp_path / 'run', []
    with pytest.raises(Stopped):
        run(folder, criterion=criterion, callback=stop)
    assert {path.name for path in folder.iterdir()} - {'relevance.safetensors'} == {'state.safetensors'}
    torch.manual_seed(3)  # what others draw in between does not matter
    result = run(folder, criterion=criterion, callback=seen.append)
    assert alike(result, run(criterion=criterion)) and not folder.exists()
    assert [step.number for step in seen] == [step.number for step in result.history[3:]]
    assert not alike(result, run(criterion=criterion, seed=1))


SCRIPT = '''
import sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from pipeline import test_iterate as t
from zennit_prune.relevance import _streaming as streaming
torch.set_num_threads(1)
warnings.simplefilter('ignore')
streaming.EVERY = 0.0
result = t.run(Path(sys.argv[2]), callback=lambda step: print('step', flush=True))
t.zp.save(result.model, result.plan, sys.argv[3])
'''


def test_a_killed_process_resumes_to_the_bit(tmp_path: Path) -> None:
    folder, saved = tmp_path / 'run', tmp_path / 'small.safetensors'
    command = [sys.executable, '-c', SCRIPT, str(Path(__file__).parents[1]), str(folder), str(saved)]
    # killed while it collects, right after a step, and while it starts
    for said, count in (('batch', 11), ('step', 2), ('batch', 1)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            count -= line.strip() == said
            if not count:
                process.send_signal(signal.SIGKILL)
                break
        process.wait(60)
        process.stdout.close()
        assert process.returncode == -signal.SIGKILL and folder.is_dir()
    subprocess.run(command, check=True, timeout=100, stdout=subprocess.DEVNULL)
    expected = run()
    assert equal(zp.load(NETWORKS['residual'](), saved), expected.model) and not folder.exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    with pytest.raises(Stopped):
        run(folder, callback=stop)
    state = (folder / 'state.safetensors').read_bytes()
    for option, message in (({'seed': 1}, 'its seed was 0, and is 1 here'), ({'repair': 'none'}, 'its repair was'),
                            ({'finetune': None}, 'its finetune was'), ({'per_cost': False}, 'its options was')):
        with pytest.raises(zp.PruneError, match=f'checkpoint of another run: {message}'):  # fmt: skip
            run(folder, **option)
    for network, message in ((chain(), 'its weights was'), (seeded(Residual(8), 1), 'its weights was')):
        with pytest.raises(zp.PruneError, match=message):
            pruner(network).iterate(data(), zp.Budget(flops=0.4), checkpoint=folder, **QUIET)
    assert (folder / 'state.safetensors').read_bytes() == state
    (tmp_path / 'file').write_text('something')
    with pytest.raises(zp.PruneError, match='is a file: name a folder'):
        run(tmp_path / 'file')
    assert (tmp_path / 'file').read_text() == 'something'


@pytest.mark.parametrize('number', [1, 2])
def test_a_checkpoint_with_the_names_of_before_is_resumed(number: int, tmp_path: Path) -> None:
    def stop_early(step: zp.pipeline.Step) -> None:
        if step.number == number:
            raise Stopped

    folder = tmp_path / 'run'
    with pytest.raises(Stopped):
        run(folder, min_score=0.0, callback=stop_early)
    tensors, metadata = read_tensors(folder / 'state.safetensors', FORMAT)
    settings, history = json.loads(metadata['settings']), json.loads(metadata['history'])
    settings['floor'] = settings.pop('min_score')
    for step in history:
        step['stability'] = step.pop('reliability')
    metadata.update(settings=json.dumps(settings), history=json.dumps(history))
    write_tensors(folder / 'state.safetensors', tensors, metadata, FORMAT)
    with pytest.raises(zp.PruneError, match=r'of another run: its min_score was 0\.0, and is 0\.1 here'):
        run(folder, min_score=0.1)
    assert alike(run(folder, min_score=0.0), run(min_score=0.0)) and not folder.exists()


def test_a_folder_with_other_files_stays(tmp_path: Path) -> None:
    (tmp_path / 'notes').write_text('mine')
    run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['notes']


# --- references
def kept(loader: Any, limit: int = 20, **options: Any) -> list[Any]:
    one = References(loader, limit, **options)
    list(one)
    return [inputs for inputs, _ in one.inputs(torch.device('cpu'))]


def numbered(count: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    numbers = torch.arange(count)
    return list(zip(numbers.float().view(-1, 1).split(size), (numbers * 10 // count).split(size)))


def test_all_inputs_are_kept_up_to_a_limit_and_of_more_a_uniform_choice() -> None:
    assert torch.equal(torch.cat(kept(numbered(20, 3))).flatten(), torch.arange(20.0))
    chosen = torch.cat(kept(numbered(2000, 7), 200)).flatten()
    assert len(chosen) == 200 == len(chosen.unique()) and torch.equal(chosen, chosen.sort().values)
    assert all(10 <= count <= 32 for count in torch.bincount((chosen * 10 / 2000).long(), minlength=10).tolist())
    assert torch.equal(chosen, torch.cat(kept(numbered(2000, 7), 200)).flatten())
    assert not torch.equal(chosen, torch.cat(kept(numbered(2000, 7), 200, seed=1)).flatten())


def test_memory_does_not_grow_with_the_samples() -> None:
    one = References(numbered(600, 1), 50)
    for number, _ in enumerate(one):
        if number % 50 == 0:
            assert sum(len(keys) for keys, _ in one._chunks) <= 50
    assert not References(numbered(10, 1), 0)._chunks


def test_the_loader_is_passed_on_as_it_is() -> None:
    loader = numbered(50, 4)
    for one in (References(loader, 3), References((pair for pair in loader), 3)):
        assert all(a is c and b is d for (a, b), (c, d) in zip(one, loader, strict=True))
    assert len(References(loader)) == 13 and len(References(data(40))) == 2
    with pytest.raises(TypeError):
        len(References(pair for pair in loader))


def test_only_references_that_count_are_kept() -> None:
    x, target = data(8)
    x[3] = float('nan')
    assert torch.equal(torch.cat(kept((x, target), classes=(0, 3))), x[[0, 4, 7]])
    assert torch.equal(torch.cat(kept([(x, target)])), x[[0, 1, 2, 4, 5, 6, 7]])


@pytest.mark.parametrize('limit', [3, 100])
def test_inputs_of_any_structure_are_kept(limit: int) -> None:
    def batch(count: int) -> dict[str, Any]:
        return {'x': images(count), 'more': (labels(count), torch.tensor(2.0)), 'flag': True}

    found = kept([batch(4), batch(5), batch(1)], limit)
    assert len(found) == 1 and len(found[0]['x']) == min(limit, 10) == len(found[0]['more'][0])
    assert found[0]['flag'] is True and found[0]['more'][1] == 2
    sizes = [len(inputs) for inputs in kept([images(4), images(2), images(3, 6)], limit=100)]
    assert sizes == [6, 3]  # images of other shapes are not joined


class Says(nn.Module):
    '''Predicts the class that the first pixel says.'''

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, classes)
        self.register_buffer('rows', torch.eye(classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e-3 * self.fc(self.conv(x).relu().mean((2, 3))) + x[:, 0, 0, :1] * self.rows[0] + (
            x[:, 0, 1, :1] * self.rows[-1])  # fmt: skip


@pytest.mark.parametrize(('classes', 'warns'), [(2, False), (4, False), (5, True)])
def test_references_of_few_classes_are_warned_of(classes: int, warns: bool) -> None:
    x = images(4).abs()
    x[:, 0, :2, 0] = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.0, 9.0]])

    def said(**options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            zp.Pruner(seeded(Says(classes)), None, x).iterate(
                (x, labels(4, 2)), zp.Budget(flops=0.5), 0.3, 'l1', **QUIET, **options)  # fmt: skip
        return [str(one.message) for one in caught if 'forgets' in str(one.message)]

    assert len(said()) == warns  # once, not at every step
    assert all('the references show 2 of the 5 classes' in message for message in said())
    assert not said(repair='none') and not said(repair='batchnorm') and not said(classes=(0, 1))


def test_what_the_repair_gets_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    monkeypatch.setattr(steps, 'KEPT', 5)
    loader = DataLoader(TensorDataset(*data()), 4)
    pruner().prune(loader, zp.Budget(flops=0.5), **QUIET)
    assert len(calls[0][2]) == 5
    assert references.KEPT == 1024  # the documented number


# --- presets
def test_the_papers_rule_is_z_plus_without_biases() -> None:
    torch.manual_seed(0)
    layer = seeded(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)))
    x = images(2, 2)
    rule = zp.presets.paper.composite()
    with rule.context(layer) as network:
        x.requires_grad_()
        (found,) = torch.autograd.grad(network(x), x, torch.eye(3)[[0, 2]])
    hidden = layer[:3](x).detach()
    weight = layer[3].weight[[0, 2]].detach()
    shares = (hidden * weight).clamp(min=0)
    upper = (shares / shares.sum(1, keepdim=True)).view(2, 4, 2, 2)
    parts = (x.detach()[:, None] * layer[0].weight.detach().view(4, 3, 1, 1)).clamp(min=0)
    expected = (parts / parts.sum(2, keepdim=True) * upper[:, :, None]).nan_to_num().sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_presets_run() -> None:
    network, paper = NETWORKS['residual'](), zp.presets.paper
    one = zp.Pruner(network, paper, images(1))
    result = one.iterate(data(), zp.Budget(channels=0.8), **QUIET)
    assert result.relevance.info['aggregate'] == 'signed' and result.relevance.info['composite'] == 'LayerMapComposite'
    assert result.plan.removed and len(result.history) == 4 + 1
    assert equal(result.plan.apply(network), result.model)
    small = zp.Pruner(network, zp.presets.recommended, images(1)).prune(data(), zp.Budget(flops=0.6), **QUIET)
    assert equal(small.model, zp.prune(network, None, data(), zp.Budget(flops=0.6), **QUIET))
