'''Every criterion agrees with a computation made independently of the library, sample by sample.'''

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any, NamedTuple

import pytest
import torch
from small import Mixed, Residual, apart, chain, images, labels, lived_in, same, seeded, snapshot
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp
from zennit_prune.relevance._criteria import CRITERIA, Criterion, known_criterion, uses_data
from zennit_prune.relevance._sites import Flow, find_sites

ALL = tuple(CRITERIA)
MEASURES = tuple(name for name in CRITERIA if uses_data(name) and name != 'relevance')
Taps = dict[str, list[torch.Tensor]]


class Case(NamedTuple):
    '''A network, its forward pass written out, and by hand what each group's channels are.

    ``forward`` returns the output and, by group, the values after the nonlinearity. ``positions`` holds the positions
    of each channel in them, ``producers`` the layers that bring it forth, ``consumers`` those that read it, ``scales``
    the BatchNorms.
    '''

    model: nn.Module
    x: torch.Tensor
    forward: Callable[[Any, torch.Tensor], tuple[torch.Tensor, Taps]]
    positions: dict[str, list[list[int]]]
    producers: dict[str, list[str]]
    consumers: dict[str, list[str]]
    scales: dict[str, list[str]]


def residual_forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, Taps]:
    stream = [F.relu(m.bn(m.stem(x)))]
    taps: Taps = {'stem': stream}
    for name in ('block1', 'block2'):
        block = getattr(m, name)
        inner = F.relu(block.bn1(block.conv1(stream[-1])))
        taps[f'{name}.conv1'] = [inner]
        stream.append(F.relu(block.bn2(block.conv2(inner)) + stream[-1]))
    return m.fc(m.pool(stream[-1]).flatten(1)), taps


def mixed_forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, Taps]:
    stem = F.relu(m.depthwise(F.relu(m.norm(m.stem(x)))))
    point = F.relu(m.bn(m.point(stem)))
    left, right = F.relu(m.left(point)), F.relu(m.right(point))
    join = F.relu(m.groups(m.join(torch.cat([left, right], 1))))
    taps = {'stem': [stem], 'point': [point], 'left': [left], 'right': [right], 'join': [join]}
    return m.fc(join.flatten(1)), taps


def chain_forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, Taps]:
    taps: Taps = {}
    for name, module in m.named_children():
        x = module(x)
        if isinstance(module, nn.ReLU):
            taps[str(int(name) - 1)] = [x]
    return x, taps


class Tokens(nn.Module):
    '''Linear layers on tokens, a norm over tokens that locks nothing, and another nonlinearity.'''

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.wide = nn.Linear(6, 9)
        self.narrow = nn.Linear(9, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        x = x + self.narrow(F.gelu(self.wide(x)))
        return self.fc(x.mean(1))


def tokens_forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, Taps]:
    first = m.embed(x.flatten(2).transpose(1, 2))
    inner = F.gelu(m.wide(first))
    last = first + m.narrow(inner)
    taps = {'embed': [first, last], 'wide': [inner]}  # channels last
    return m.fc(last.mean(1)), taps


def each(size: int) -> list[list[int]]:
    return [[position] for position in range(size)]


def residual() -> Case:
    return Case(
        seeded(Residual()).double(),
        images(5, dtype=torch.float64),
        residual_forward,
        {'stem': each(6), 'block1.conv1': each(5), 'block2.conv1': each(7)},
        {'stem': ['stem', 'block1.conv2', 'block2.conv2'], 'block1.conv1': ['block1.conv1'],
         'block2.conv1': ['block2.conv1']},
        {'stem': ['block1.conv1', 'block2.conv1', 'fc'], 'block1.conv1': ['block1.conv2'],
         'block2.conv1': ['block2.conv2']},
        {'stem': ['bn', 'block1.bn2', 'block2.bn2'], 'block1.conv1': ['block1.bn1'], 'block2.conv1': ['block2.bn1']},
    )


def mixed() -> Case:
    names = ('stem', 'point', 'left', 'right', 'join')
    return Case(
        seeded(Mixed()).double(),
        images(5, dtype=torch.float64),
        mixed_forward,
        {'stem': each(8), 'point': each(6), 'left': each(5), 'right': each(8), 'join': [[0, 1], [2, 3], [4, 5]]},
        {name: [name] for name in names},
        {'stem': ['point'], 'point': ['left', 'right'], 'left': ['join'], 'right': ['join'], 'join': ['fc']},
        {'stem': ['norm'], 'point': ['bn']},
    )


def plain() -> Case:
    sizes = {'0': 6, '2': 5, '5': 7, '9': 9}
    readers = {'0': ['2'], '2': ['5'], '5': ['9'], '9': ['11']}
    return Case(chain().double(), images(5, dtype=torch.float64), chain_forward,
                {name: each(size) for name, size in sizes.items()}, {name: [name] for name in sizes}, readers, {})


def tokens() -> Case:
    return Case(seeded(Tokens()).double(), images(5, dtype=torch.float64), tokens_forward,
                {'embed': each(6), 'wide': each(9)}, {'embed': ['embed', 'narrow'], 'wide': ['wide']},
                {'embed': ['wide', 'fc'], 'wide': ['narrow']}, {})


CASES = {'residual': residual, 'mixed': mixed, 'plain': plain, 'tokens': tokens}


# --- the criteria, once more


def rows(value: torch.Tensor, positions: list[list[int]], dim: int) -> torch.Tensor:
    '''One row for each channel, with all values at its positions.'''
    return torch.stack([value.index_select(dim, torch.tensor(at)).flatten() for at in positions])


def stacked_mean(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values).mean(0)


def per_sample(case: Case, measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    '''The mean over samples and values of ``measure(activation, gradient)``, both rows of channels.'''
    found: dict[str, list[torch.Tensor]] = {name: [] for name in case.positions}
    for x, y in zip(case.x, labels(5)):
        output, taps = case.forward(case.model, x[None])
        loss = F.cross_entropy(output, y[None])
        for name, values in taps.items():
            for value, gradient in zip(values, torch.autograd.grad(loss, values, retain_graph=True)):
                dim = 1 if value.dim() != 3 else 2
                found[name].append(measure(*(rows(part[0], case.positions[name], dim - 1)
                                             for part in (value, gradient))))
    return {name: stacked_mean(values) for name, values in found.items()}


def gradient(case: Case) -> dict[str, torch.Tensor]:
    return per_sample(case, lambda activation, gradient: gradient.mean(1).abs())


def taylor(case: Case) -> dict[str, torch.Tensor]:
    return per_sample(case, lambda activation, gradient: (activation * gradient).mean(1).abs())


def activation(case: Case) -> dict[str, torch.Tensor]:
    return per_sample(case, lambda activation, gradient: activation.abs().mean(1))


def taylor_weights(case: Case) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {name: [] for name in case.positions}
    for x, y in zip(case.x, labels(5)):
        loss = F.cross_entropy(case.model(x[None]), y[None])
        for name, layers in case.producers.items():
            for layer in map(case.model.get_submodule, layers):
                parameters = list(layer.parameters())
                products = [parameter * slope for parameter, slope in zip(
                    parameters, torch.autograd.grad(loss, parameters, retain_graph=True))]
                total = sum(rows(product, case.positions[name], 0).sum(1) for product in products)
                found[name].append(total ** 2)
    return {name: stacked_mean(values) for name, values in found.items()}


def wanda(case: Case) -> dict[str, torch.Tensor]:
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in case.positions}
    inputs: dict[str, torch.Tensor] = {}
    handles = [module.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0]}))
               for name, module in case.model.named_modules()]
    case.model(case.x)
    for handle in handles:
        handle.remove()
    for name, consumers in case.consumers.items():
        for consumer in consumers:
            x, weight = inputs[consumer].detach(), case.model.get_submodule(consumer).weight.detach()
            dim = 1 if x.dim() != 3 else 2
            positions, wide = case.positions[name], x.shape[dim]
            if consumer == 'join':  # reads a concatenation
                positions = [[at + 5 * (name == 'right') for at in channel] for channel in positions]
            if consumer in ('fc', '9') and case.model.get_submodule(consumer).in_features > 6:  # flattened
                space = {'fc': 16, '9': 4}[consumer]
                positions = [[at * space + offset for at in channel for offset in range(space)]
                             for channel in positions]
            size = rows(x, positions, dim).norm(dim=1) / len(x) ** 0.5
            if weight.shape[1] < wide:  # two groups, each of which reads its own channels
                weight = torch.cat(weight.chunk(2), 1)
            scores[name].append((rows(weight, positions, 1).abs().sum(1) * size) ** 2)
    return {name: stacked_mean(values).sqrt() for name, values in scores.items()}


def weight_rows(case: Case, layer: str) -> torch.Tensor:
    return case.model.get_submodule(layer).weight.detach().flatten(1)


def fpgm(case: Case) -> dict[str, torch.Tensor]:
    scores = {}
    for name, layers in case.producers.items():
        found = []
        for layer in layers:
            filters = weight_rows(case, layer)
            distances = torch.tensor([sum(float((one - other).norm()) for other in filters) for one in filters])
            found.append(torch.stack([distances[channel].sum() for channel in case.positions[name]]))
        scores[name] = stacked_mean(found)
    return scores


def batchnorm(case: Case) -> dict[str, torch.Tensor]:
    return {name: stacked_mean([rows(case.model.get_submodule(layer).weight.abs(), case.positions[name], 0).mean(1)
                                for layer in layers]) for name, layers in case.scales.items()}


def norms(order: int) -> Callable[[Case], dict[str, torch.Tensor]]:
    def norm(case: Case) -> dict[str, torch.Tensor]:
        return {name: stacked_mean([rows(weight_rows(case, layer), case.positions[name], 0).norm(order, 1)
                                    for layer in layers]) for name, layers in case.producers.items()}
    return norm


INDEPENDENT: dict[str, Callable[[Case], dict[str, torch.Tensor]]] = {
    'gradient': gradient, 'taylor': taylor, 'taylor-weights': taylor_weights, 'activation': activation, 'wanda': wanda,
    'fpgm': fpgm, 'batchnorm': batchnorm, 'l1': norms(1), 'l2': norms(2),
}


def collect(case: Case, criterion: str, batch: int = 5, **options: Any) -> zp.Relevance:
    loader = list(zip(case.x.split(batch), labels(5).split(batch)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', zp.PruneWarning)
        return zp.Pruner(case.model, None, case.x).collect(loader, criterion, progress=False, **options)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('criterion', INDEPENDENT)
def test_equals_an_independent_computation(criterion: str, name: str) -> None:
    case = CASES[name]()
    expected = INDEPENDENT[criterion](case)
    if not expected:
        with pytest.raises(zp.PruneError, match=f'{criterion}.*says nothing.*Use another'):
            collect(case, criterion)
        return
    found = collect(case, criterion, 2)
    assert list(found) == list(expected)
    assert found.info['criterion'] == criterion
    assert found.info.get('samples', 5) == 5
    largest = max(values.abs().max() for values in expected.values())
    for group, values in expected.items():
        assert apart(found[group], values) <= 1e-7 or (values.max() < 1e-20 * largest), group


# --- what all of them share


@pytest.mark.parametrize('criterion', ALL)
def test_batches_seeds_and_networks_in_use(criterion: str) -> None:
    '''Neither the batch size nor another run matters, and the network is left alone.'''
    case = residual()
    whole = collect(case, criterion)
    for batch in (1, 2, 3):
        found = collect(case, criterion, batch)
        assert all(apart(found[name], whole[name]) <= 1e-12 for name in whole)
    again = collect(case, criterion)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    model = lived_in(seeded(Residual()))
    before = snapshot(model)
    zp.Pruner(model, None, images()).collect([(images(), labels())], criterion, progress=False)
    assert same(before, snapshot(model))


@pytest.mark.parametrize('criterion', MEASURES)
def test_merge_reliability_and_files(criterion: str, tmp_path: Any) -> None:
    case = mixed()
    pruner = zp.Pruner(case.model, None, case.x)
    parts = [pruner.collector(criterion=criterion) for _ in range(2)]
    for part, x, y in zip(parts, case.x.split(3), labels(5).split(3)):
        with part:
            part.update(x, y)
    merged, whole = parts[0].merge(parts[1]).compute(), collect(case, criterion)
    assert all(apart(merged[name], whole[name]) <= 1e-12 for name in whole)
    assert whole.reliability().groups.keys() == case.positions.keys()
    whole.save(tmp_path / 'scores')
    assert repr(zp.Relevance.load(tmp_path / 'scores')) == repr(whole)
    with pytest.raises(zp.PruneError, match='differ in criterion'):
        parts[0].merge(_filled(pruner.collector(parts[0].aggregate, parts[0].initial), case))


def _filled(collector: zp.relevance.Collector, case: Case) -> zp.relevance.Collector:
    with collector:
        collector.update(case.x, labels(5))
    return collector


@pytest.mark.parametrize('criterion', MEASURES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(criterion: str, dtype: torch.dtype) -> None:
    case = mixed()
    expected = collect(case, criterion)
    found = collect(case._replace(model=case.model.to(dtype), x=case.x.to(dtype)), criterion)
    for name in set(expected) - {'join'}:  # what is zero before GroupNorm is noise in half precision
        assert apart(found[name], expected[name]) <= (0.1 if dtype == torch.float16 else 0.7)


def test_taylor_of_the_logit_is_epsilon() -> None:
    '''In a ReLU network, relevance by epsilon that starts from the logit is activation times gradient.'''
    case = plain()
    relevance = collect(case, 'relevance', initial='logit', aggregate='abs')
    found = collect(case, 'taylor', initial='one-hot')
    for name in relevance:
        assert apart(found[name] / found[name].sum(), relevance[name] / relevance[name].sum()) <= 1e-4


def test_targets_of_all_kinds() -> None:
    case = residual()
    expected = collect(case, 'taylor')
    pruner = zp.Pruner(case.model, None, case.x)
    rows_ = F.one_hot(labels(5), 4)
    functions = [lambda output: output.softmax(1) - rows_]
    for target in (rows_, rows_.double(), *functions):
        found = pruner.collect([(case.x, target)], 'taylor', progress=False)
        assert all(apart(found[name], expected[name]) <= 1e-12 for name in expected)
    found = pruner.collect([case.x], 'taylor', initial=functions[0], progress=False)
    assert all(apart(found[name], expected[name]) <= 1e-12 for name in expected)
    predicted = case.model(case.x).argmax(1)
    one, other = (pruner.collect([(case.x, target)], 'gradient', progress=False) for target in (predicted, 'predicted'))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_dense_outputs() -> None:
    '''The loss of a sample is the mean over its pixels.'''
    model = seeded(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 1))).double()
    x, mask = images(3, dtype=torch.float64), torch.arange(192).reshape(3, 8, 8) % 4
    expected = []
    for image, classes in zip(x, mask):
        value = model[1](model[0](image[None]))
        slope, = torch.autograd.grad(F.cross_entropy(model[2](value), classes[None]), value)
        expected.append((value * slope).mean((0, 2, 3)).abs())
    found = zp.Pruner(model, None, x).collect([(x, mask)], 'taylor', progress=False)
    assert apart(found['0'], stacked_mean(expected)) <= 1e-12


@pytest.mark.parametrize('criterion', MEASURES)
def test_without_labels(criterion: str) -> None:
    case = residual()
    pruner = zp.Pruner(case.model, None, case.x)
    if criterion in ('activation', 'wanda'):
        assert pruner.collect([case.x], criterion, progress=False).info['samples'] == 5
    else:
        with pytest.raises(zp.PruneError, match=r"no labels: give a loader.*'predicted'.*initial="):
            pruner.collect([case.x], criterion, progress=False)


def test_a_single_column_is_a_binary_classifier_or_needs_a_loss() -> None:
    model, x = seeded(nn.Sequential(nn.Conv2d(3, 5, 8), nn.ReLU(), nn.Flatten(), nn.Linear(5, 1))), images()
    pruner = zp.Pruner(model, None, x)
    binary, loss = torch.tensor([0, 1, 1, 0]), lambda output: output.sigmoid() - binary[:, None]
    found, expected = (pruner.collect([(x, target)], 'taylor', progress=False, initial=initial)
                       for target, initial in ((binary, 'auto'), (None, loss)))
    assert apart(found['0'], expected['0']) <= 1e-6
    with pytest.raises(zp.PruneError, match=r"single column.*label 0\.5.*initial='value'"):
        pruner.collect([(x, torch.full((4,), 0.5))], 'taylor', progress=False)
    assert pruner.collect([x], 'taylor', initial=lambda output: output - 1, progress=False)


def test_groups_without_batchnorm_are_kept_whole() -> None:
    case = mixed()
    pruner = zp.Pruner(case.model, None, case.x)
    with pytest.warns(zp.PruneWarning, match='kept whole: left, right, join') as caught:
        relevance = pruner.collect((), 'batchnorm')
    assert caught[0].filename == __file__
    plan = pruner.plan(relevance, zp.Budget(flops=0.9))
    assert {name for name, removed in plan.removed.items() if removed} <= {'stem', 'point'}


def test_unknown_names() -> None:
    pruner = zp.Pruner(plain().model.float(), None, images())
    with pytest.raises(zp.PruneError) as caught:
        pruner.collect([], 'taylr')
    assert all(repr(name) in str(caught.value) for name in ALL)
    assert all(f"'{name}'" in str(type(pruner).collect.__doc__) for name in ALL)
    with pytest.raises(zp.PruneError, match=r"'l1' is no criterion that uses data.*'taylor'"):
        pruner.collector(criterion='l1')
    with pytest.raises(zp.PruneError, match='aggregate'):
        pruner.collect([], 'taylor', aggregate='most')


# --- criteria as data
DESCRIBED: dict[str, dict[str, Any]] = {
    'relevance': {'lrp': True, 'activations': False, 'gradients': True, 'aggregate': 'auto', 'initial': 'one-hot',
                  'per_element': False, 'per_sample': True},
    'gradient': {'lrp': False, 'activations': False, 'gradients': True, 'aggregate': 'abs',
                 'initial': 'cross-entropy', 'per_element': True, 'per_sample': True},
    'taylor': {'lrp': False, 'activations': True, 'gradients': True, 'aggregate': 'abs', 'initial': 'cross-entropy',
               'per_element': True, 'per_sample': True},
    'taylor-weights': {'lrp': False, 'activations': True, 'gradients': True, 'aggregate': 'abs',
                       'initial': 'cross-entropy', 'per_element': False, 'per_sample': True},
    'activation': {'lrp': False, 'activations': True, 'gradients': False, 'aggregate': 'sumabs', 'per_element': True,
                   'per_sample': True},
    'wanda': {'lrp': False, 'activations': True, 'gradients': False, 'aggregate': 'sumabs', 'per_element': False,
              'per_sample': False},
}


@pytest.mark.parametrize('name', DESCRIBED)
def test_a_description_is_immutable_and_what_the_collector_goes_by(name: str) -> None:
    criterion = known_criterion(name)
    assert isinstance(criterion, Criterion) and criterion.name == name
    assert {key: getattr(criterion, key) for key in DESCRIBED[name]} == DESCRIBED[name]
    with pytest.raises(FrozenInstanceError):
        criterion.aggregate = 'signed'  # type: ignore[misc]
    case = residual()
    pruner = zp.Pruner(case.model, None, case.x)
    collector = pruner.collector(criterion=criterion)
    assert collector.criterion is criterion and type(collector) is zp.relevance.Collector
    info = collect(case, name).info
    assert ('composite' in info) == criterion.lrp and ('initial' in info) == criterion.gradients
    assert info['aggregate'] == ('abs' if name == 'relevance' else criterion.aggregate)
    by_name, by_value = collect(case, name), collect(case, criterion)  # type: ignore[arg-type]
    assert all(torch.equal(by_name[group], by_value[group]) for group in by_name)


def test_every_criterion_that_uses_data_is_described() -> None:
    assert set(DESCRIBED) == {'relevance', *MEASURES}


@pytest.mark.parametrize('name', CASES)
def test_a_criterion_of_your_own(name: str) -> None:
    '''The mean squared activation: one value says all that the collector needs.'''
    case = CASES[name]()
    energy = Criterion('energy', lambda graph, model: find_sites(graph, Flow.behind_activations),
                       lambda activation, gradient: activation ** 2, 'sumabs', 'one-hot', activations=True,
                       gradients=False)
    expected = per_sample(case, lambda activation, gradient: (activation ** 2).mean(1))
    found = collect(case, energy, 2)  # type: ignore[arg-type]
    assert found.info['criterion'] == 'energy' and list(found) == list(expected)
    assert all(apart(found[group], values) <= 1e-9 for group, values in expected.items())
    root = collect(case, replace(energy, finish=torch.sqrt))  # type: ignore[arg-type]
    assert all(apart(root[group], values.sqrt()) <= 1e-9 for group, values in expected.items())


def test_quantities_see_what_the_description_says() -> None:
    case, seen = plain(), []

    def look(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        seen.append((activation.numel() > 0, gradient.numel() > 0))
        return gradient if gradient.numel() else activation

    for activations, gradients in ((True, True), (False, True), (True, False)):
        seen.clear()
        collect(case, Criterion('look', lambda graph, model: find_sites(graph, Flow.behind_activations), look,  # type: ignore
                                'abs', 'cross-entropy', activations=activations, gradients=gradients))
        assert set(seen) == {(activations, gradients)}


def test_names_near_a_criterion_are_suggested() -> None:
    pruner = zp.Pruner(plain().model.float(), None, images())
    for name, message in (('taylr', "did you mean 'taylor'"), ('Wanda', "did you mean 'wanda'"), (3, 'criterion=3')):
        with pytest.raises(zp.PruneError, match=message):
            pruner.collector(criterion=name)  # type: ignore[arg-type]
