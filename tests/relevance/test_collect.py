'''Collecting relevance leaves networks alone, and agrees with readings made independently of the library.'''

from __future__ import annotations

import copy
import gc
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from small import (
    Functional,
    Injected,
    Mixed,
    Modular,
    RaisingRule,
    Residual,
    Tripwire,
    apart,
    chain,
    composite,
    images,
    labels,
    lived_in,
    same,
    seeded,
    snapshot,
)
from torch import nn
from torch.nn import functional as F
from zennit.attribution import SmoothGrad
from zennit.canonizers import Canonizer, SequentialMergeBatchNorm
from zennit.composites import COMPOSITES, EpsilonPlus, LayerMapComposite, layer_map_base
from zennit.core import Composite
from zennit.rules import Epsilon, Gamma, Norm, Pass, WSquare, ZPlus
from zennit.types import Activation, AvgPool, Convolution, Linear

import zennit_prune as zp

AGGREGATES = ('abs', 'sumabs', 'signed', 'positive')


# --- guards


class RaisingCanonizer(Canonizer):
    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        raise Injected('the canonizer raises')

    def register(self) -> None:
        '''Nothing.'''

    def remove(self) -> None:
        '''Nothing.'''


class Guarded(Residual):
    '''A residual network that can be made to fail while it is run or copied.'''

    def __init__(self) -> None:
        super().__init__()
        self.trip = Tripwire()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trip(super().forward(x))


def raising_loader() -> Iterator[Any]:
    yield images(), labels()
    raise Injected('the loader raises')


def tripped(model: Guarded, when: str, action: Callable[[], Any]) -> None:
    model.trip.armed = when
    Tripwire.armed = when
    try:
        action()
    finally:
        del model.trip.armed
        Tripwire.armed = ''


class Bench:
    '''A network in use, its plan and its composite, all made before the snapshot.'''

    def __init__(self, rules: Composite | None = None):
        self.model = lived_in(seeded(Guarded()))
        self.composite = rules or EpsilonPlus(canonizers=[SequentialMergeBatchNorm()])
        self.pruner = zp.Pruner(self.model, self.composite, images())
        self.plan = zp.Plan(self.pruner.graph).remove('stem', [0, 3]).remove('block1.conv1', [1])
        self.small = self.plan.apply(self.model)

    def collect(self, loader: Any = None) -> Any:
        return self.pruner.collect(loader or [(images(), labels())], progress=False)


FAILURES: dict[str, tuple[Callable[[], Composite | None], Callable[[Bench], Any]]] = {
    'collect': (lambda: None, lambda b: b.collect()),
    'collect, all criteria': (
        lambda: None,
        lambda b: [b.pruner.collect([], criterion=c) for c in ('random', 'l1', 'l2')],
    ),
    'heatmap': (lambda: None, lambda b: zp.heatmap(b.model, b.composite, images())),
    'pruner.heatmap': (lambda: None, lambda b: b.pruner.heatmap(images())),
    'apply': (lambda: None, lambda b: b.plan.apply(b.model)),
    'masked': (lambda: None, lambda b: b.plan.masked(b.model)(images())),
    'verify': (lambda: None, lambda b: zp.verify(b.model, b.small, b.plan, images())),
    'cost': (lambda: None, lambda b: zp.cost(b.model, images())),
    'latency': (lambda: None, lambda b: zp.latency(b.model, images(), repeats=1)),
    'trace': (lambda: None, lambda b: zp.trace(b.model, images())),
    'plan': (lambda: None, lambda b: b.pruner.plan(b.pruner.collect([], criterion='l1'), zp.Budget(flops=0.5))),
}
RAISING: dict[str, tuple[Callable[[], Composite | None], Callable[[Bench], Any]]] = {
    'collect, rule': (
        lambda: LayerMapComposite([(Convolution, RaisingRule())], [SequentialMergeBatchNorm()]),
        lambda b: b.collect(),
    ),
    'heatmap, rule': (
        lambda: LayerMapComposite([(Convolution, RaisingRule())], [SequentialMergeBatchNorm()]),
        lambda b: b.pruner.heatmap(images()),
    ),
    'collect, canonizer': (
        lambda: EpsilonPlus(canonizers=[SequentialMergeBatchNorm(), RaisingCanonizer()]),
        lambda b: b.collect(),
    ),
    'heatmap, canonizer': (
        lambda: EpsilonPlus(canonizers=[SequentialMergeBatchNorm(), RaisingCanonizer()]),
        lambda b: zp.heatmap(b.model, b.composite, images()),
    ),
    'collect, loader': (lambda: None, lambda b: b.collect(raising_loader())),
    'collect, initial': (lambda: None, lambda b: b.pruner.collect([images()], initial=_raising, progress=False)),
    'collect, forward': (lambda: None, lambda b: tripped(b.model, 'run', b.collect)),
    'heatmap, forward': (lambda: None, lambda b: tripped(b.model, 'run', lambda: b.pruner.heatmap(images()))),
    'apply, trace': (lambda: None, lambda b: tripped(b.model, 'run', lambda: b.plan.apply(b.model))),
    'apply, numbers': (lambda: None, lambda b: tripped(b.model, 'values', lambda: b.plan.apply(b.model))),
    'apply, copy': (lambda: None, lambda b: tripped(b.model, 'copy', lambda: b.plan.apply(b.model))),
    'apply_, numbers': (lambda: None, lambda b: tripped(b.model, 'values', lambda: b.plan.apply_(b.model))),
    'masked, copy': (lambda: None, lambda b: tripped(b.model, 'copy', lambda: b.plan.masked(b.model))),
    'verify, forward': (
        lambda: None,
        lambda b: tripped(b.model, 'run', lambda: zp.verify(b.model, b.small, b.plan, images())),
    ),
}


def _raising(output: torch.Tensor) -> torch.Tensor:
    raise Injected('the initial relevance raises')


@pytest.mark.parametrize('name', [*FAILURES, *RAISING])
def test_nothing_is_changed_whatever_happens(name: str) -> None:
    '''Parameters, buffers, flags, gradients, hooks and the random state outlive every step and every failure.'''
    rules, action = {**FAILURES, **RAISING}[name]
    bench = Bench(rules())
    canonizers, contents = bench.composite.canonizers, list(bench.composite.canonizers)
    before, small = snapshot(bench.model), snapshot(bench.small)
    if name in RAISING:
        with pytest.raises((Injected, zp.PruneError)):
            action(bench)
    else:
        action(bench)
    assert same(before, snapshot(bench.model))
    assert same(small, snapshot(bench.small))
    assert bench.composite.canonizers is canonizers and canonizers == contents
    assert not bench.composite.handles and not list(bench.composite.hook_refs)


def test_guard_sees_changes() -> None:
    '''The guard itself notices what it has to notice.'''
    changes: list[Callable[[nn.Module], Any]] = [
        lambda m: m.train(),
        lambda m: setattr(m.bn, 'eps', 0.0),
        lambda m: m.stem.register_forward_hook(_raising),
        lambda m: setattr(m.stem, 'weight', nn.Parameter(m.stem.weight.detach().clone())),
        lambda m: torch.rand(1),
        lambda m: m.bn.running_mean.add_(1e-9),
        lambda m: setattr(m, 'forward', m.forward),
        lambda m: m.zero_grad(),
        lambda m: m.fc.weight.requires_grad_(not m.fc.weight.requires_grad),
    ]
    for change in changes:
        model = lived_in(seeded(Residual()))
        before = snapshot(model)
        assert same(before, snapshot(model))
        change(model)
        assert not same(before, snapshot(model))


def test_composite_of_a_failed_pass_works_again() -> None:
    bench = Bench()
    with pytest.raises((Injected, zp.PruneError)):
        bench.collect(raising_loader())
    fresh = zp.Pruner(bench.model, EpsilonPlus(canonizers=[SequentialMergeBatchNorm()]), images())
    expected = fresh.collect([(images(), labels())], progress=False)
    again = bench.collect()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


# --- independent readings


def read(
    model: nn.Module, rules: Composite, x: torch.Tensor, start: torch.Tensor, names: list[str]
) -> dict[str, torch.Tensor]:
    '''The relevance of the outputs of modules, the way Zennit documents it.'''
    model, kept = copy.deepcopy(model), {}
    with rules.context(model) as modified:
        for name in names:

            def keep(module: nn.Module, inputs: Any, output: torch.Tensor, name: str = name) -> None:
                output.retain_grad()
                kept[name] = output

            modified.get_submodule(name).register_forward_hook(keep)
        output = modified(x.detach().clone().requires_grad_())
        output.backward(start)
        return {name: tensor.grad.detach() for name, tensor in kept.items()}


def aggregated(relevance: torch.Tensor, aggregate: str) -> torch.Tensor:
    '''Channel scores from the relevance of one tensor, by hand.'''
    scores = []
    for sample in relevance.double():
        spatial = sample.reshape(len(sample), -1)
        total = torch.stack([row.sum() for row in spatial])
        scores.append(
            {
                'abs': total.abs(),
                'sumabs': torch.stack([row.abs().sum() for row in spatial]),
                'signed': total,
                'positive': total.clamp(min=0),
            }[aggregate]
        )
    return torch.stack(scores).mean(0)


def handwritten() -> Composite:
    return LayerMapComposite(
        [(Activation, Pass()), (AvgPool, Norm()), (nn.Linear, WSquare()), (Convolution, Gamma(0.5))]
    )


CHAIN_RULES: dict[str, Callable[[], Composite]] = {
    'EpsilonPlus': composite,
    'EpsilonAlpha2Beta1': lambda: composite('epsilon_alpha2_beta1'),
    'EpsilonGammaBox': lambda: composite('epsilon_gamma_box'),
    'EpsilonPlusFlat': lambda: composite('epsilon_plus_flat'),
    'handwritten': handwritten,
}


@pytest.mark.parametrize('aggregate', AGGREGATES)
@pytest.mark.parametrize('rules', CHAIN_RULES)
def test_chain_equals_zennits_reading(rules: str, aggregate: str) -> None:
    model, x, target = chain(), images(5), labels(5)
    found = zp.Pruner(model, CHAIN_RULES[rules](), x).collector(aggregate)
    with found:
        found.update(x[:2], target[:2])
        found.update(x[2:], target[2:])
    relevance = found.compute()
    names = ['0', '2', '5', '9']
    expected = read(model, CHAIN_RULES[rules](), x, F.one_hot(target, 4).float(), names)
    assert list(relevance) == names
    for name in names:
        assert apart(relevance[name], aggregated(expected[name], aggregate)) <= 1e-6


@pytest.mark.parametrize('aggregate', AGGREGATES)
def test_stream_is_the_mean_over_its_states(aggregate: str) -> None:
    '''First value and the output of each addition, read in a network written with ``Sum`` modules.'''
    functional = seeded(Functional()).double()
    modular = Modular().double().eval()
    modular.load_state_dict(functional.state_dict())
    x, target = images(3, dtype=torch.float64), labels(3)
    relevance = zp.Pruner(functional, composite(), x).collect([(x, target)], aggregate=aggregate, progress=False)
    states = read(
        modular, composite(), x, F.one_hot(target, 4).double(), ['stem', 'sums.0', 'sums.1', 'conv1', 'conv3']
    )
    stream = torch.stack([aggregated(states[name], aggregate) for name in ('stem', 'sums.0', 'sums.1')]).mean(0)
    assert apart(relevance['stem'], stream) <= 1e-6
    for name in ('conv1', 'conv3'):
        assert apart(relevance[name], aggregated(states[name], aggregate)) <= 1e-6


POOLS: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
    'module': None,
    'mean': lambda x: x.mean((2, 3)),
    'function': lambda x: F.adaptive_avg_pool2d(x, 1),
    'average': lambda x: F.avg_pool2d(x, 8),
}


@pytest.mark.parametrize('pool', list(POOLS))
@pytest.mark.parametrize('rules', ['epsilon_plus', 'epsilon_alpha2_beta1', 'epsilon', 'epsilon_gamma_box'])
def test_modules_and_functions_agree(rules: str, pool: str) -> None:
    modular = seeded(Modular()).double()
    functional = Functional(POOLS[pool]).double().eval()
    functional.load_state_dict(modular.state_dict())
    x, target = images(3, dtype=torch.float64), labels(3)
    left, right = (
        zp.Pruner(model, None if rules == 'epsilon' else composite(rules), x).collect([(x, target)], progress=False)
        for model in (functional, modular)
    )
    assert list(left) == list(right) == ['stem', 'conv1', 'conv3']
    for name in ('conv1', 'conv3'):
        assert apart(left[name], right[name]) <= 1e-6


def test_stream_of_a_network_written_with_sum_modules() -> None:
    modular = seeded(Modular()).double()
    functional = Functional().double().eval()
    functional.load_state_dict(modular.state_dict())
    x, target = images(3, dtype=torch.float64), labels(3)
    left, right = (
        zp.Pruner(model, composite(), x).collect([(x, target)], progress=False) for model in (functional, modular)
    )
    assert apart(right['stem'], left['stem']) <= 1e-6


# --- conservation


def plain_with_batchnorm() -> nn.Module:
    return seeded(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 5, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20, 4),
        )
    )


def test_relevance_is_conserved_at_plain_layers() -> None:
    x = images(6)
    pruner = zp.Pruner(plain_with_batchnorm(), EpsilonPlus(zero_params='bias'), x)
    for sample in range(len(x)):
        relevance = pruner.collect(
            [(x[sample : sample + 1], torch.tensor([sample % 4]))], aggregate='signed', progress=False
        )
        for name, values in relevance.items():
            assert values.sum().item() == pytest.approx(1, abs=2e-3), name


def test_relevance_is_conserved_in_residual_streams() -> None:
    '''In a ResNet-18, each stream carries all relevance, and each block's inside a share of it.'''
    model = seeded(torchvision.models.resnet18(num_classes=4))
    x = images(2, 32)
    relevance = zp.Pruner(model, EpsilonPlus(zero_params='bias'), x).collect(
        [(x, labels(2))], aggregate='signed', progress=False
    )
    for name in ('conv1', 'layer2.0.conv2', 'layer3.0.conv2', 'layer4.0.conv2'):
        assert relevance[name].sum().item() == pytest.approx(1, abs=5e-3), name
    for name in ('layer1.0.conv1', 'layer2.1.conv1', 'layer4.1.conv1'):
        assert -1 < relevance[name].sum().item() < 2, name


@pytest.mark.parametrize('pool', list(POOLS))
def test_relevance_is_conserved_in_functional_residual_networks(pool: str) -> None:
    '''Functional activations, additions and pools lose nothing.'''
    x = images(4)
    rules = EpsilonPlus(zero_params='bias')
    relevance = zp.Pruner(seeded(Functional(POOLS[pool])), rules, x).collect(
        [(x, labels())], aggregate='signed', progress=False
    )
    assert relevance['stem'].sum().item() == pytest.approx(1, abs=5e-3)


def test_relevance_is_conserved_with_batchnorm_and_functional_additions() -> None:
    x = images(4)
    rules = EpsilonPlus(zero_params='bias')
    relevance = zp.Pruner(seeded(Residual()), rules, x).collect([(x, labels())], aggregate='signed', progress=False)
    assert relevance['stem'].sum().item() == pytest.approx(1, abs=5e-3)


def pretrained(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    '''A real network, and images it was made for.'''
    folder = Path(os.environ.get('ZENNIT_PRUNE_DATA', Path(__file__).resolve().parents[3] / 'shared' / 'data'))
    if not (folder / f'{name}.pt').exists():
        pytest.skip(f'the pretrained {name} is not there: set ZENNIT_PRUNE_DATA to the folder that holds it')
    spec = importlib.util.spec_from_file_location('pretrained_networks', folder / 'loaders.py')
    loaders = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaders)
    model, preprocess = loaders.load(name)
    pictures, target = loaders.cifar10('test_5k')
    return model, preprocess(pictures[:8]), target[:8]


def with_pool_module(model: nn.Module) -> nn.Module:
    '''The ResNet-8 with a module in place of ``x.mean((2, 3))``.'''

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.fc(self.pool(self.b3(self.b2(self.b1(x)))).flatten(1))

    twin = copy.deepcopy(model)
    twin.pool = nn.AdaptiveAvgPool2d(1)
    twin.__class__ = type(type(model).__name__, (type(model),), {'forward': forward})
    return twin


def test_relevance_is_conserved_in_a_pretrained_network() -> None:
    model, x, target = pretrained('resnet8_mlperftiny_cifar10')
    model = with_pool_module(model)
    relevance = zp.Pruner(model, EpsilonPlus(zero_params='bias'), x).collect(
        [(x, target)], aggregate='signed', progress=False
    )
    for name in ('conv', 'b2.conv2', 'b3.conv2'):
        assert relevance[name].sum().item() == pytest.approx(1, abs=0.03), name


def test_a_pretrained_network_is_ranked_the_same_with_a_pool_module() -> None:
    model, x, target = pretrained('resnet8_mlperftiny_cifar10')
    left, right = (
        zp.Pruner(network, None, x).collect([(x, target)], progress=False)
        for network in (model, with_pool_module(model))
    )
    assert all(apart(left[name], right[name]) <= 1e-3 for name in left)


@pytest.mark.parametrize(
    'norm',
    [
        pytest.param(lambda: nn.BatchNorm2d(6), id='batch'),
        *(
            pytest.param(norm, id=name)
            for name, norm in {
                'instance': lambda: nn.InstanceNorm2d(6),
                'instance, affine': lambda: nn.InstanceNorm2d(6, affine=True),
                'group of one': lambda: nn.GroupNorm(6, 6),
                'group of two': lambda: nn.GroupNorm(3, 6),
            }.items()
        ),
    ],
)
def test_relevance_before_a_norm_is_not_noise(norm: Callable[[], nn.Module]) -> None:
    model = seeded(
        nn.Sequential(
            nn.Conv2d(3, 6, 3), norm(), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4)
        )
    )
    x = images(dtype=torch.float64)
    relevance = zp.Pruner(model.double(), composite(), x).collect([(x, labels())], aggregate='abs', progress=False)
    assert relevance['0'].max() > 1e-6 * relevance['3'].max()


# --- every composite, every size of batch


@pytest.mark.parametrize('name', sorted(COMPOSITES))
def test_all_composites_run(name: str) -> None:
    relevance = zp.Pruner(chain(), composite(name), images()).collect([(images(), labels())], progress=False)
    assert list(relevance) == ['0', '2', '5', '9']
    assert all(values.abs().sum() > 0 for _, values in relevance.items())
    assert relevance.info['composite'] == COMPOSITES[name].__name__


@contextmanager
def young_objects_only() -> Iterator[None]:
    '''Let ``gc.get_objects`` know only what is made inside: what earlier tests left may go at any time.'''
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('rules', ['epsilon_plus', 'epsilon_alpha2_beta1', 'epsilon_gamma_box', 'guided_backprop'])
def test_memory_does_not_grow(rules: str) -> None:
    model = chain() if rules == 'guided_backprop' else seeded(Residual())
    with zp.Pruner(model, composite(rules), images()).collector() as collector, young_objects_only():
        counts, objects = [], []
        for number in range(1, 31):
            collector.update(images(seed=number), labels())
            if number in (5, 30):
                counts.append(_live_tensors())
                objects.append(len(gc.get_objects()))
    assert counts[0] == counts[1]
    assert abs(objects[1] - objects[0]) < 50


@pytest.mark.parametrize('aggregate', AGGREGATES)
@pytest.mark.parametrize('build', [chain, lambda: seeded(Residual()), lambda: seeded(Mixed())])
def test_size_of_batches_does_not_matter(build: Callable[[], nn.Module], aggregate: str) -> None:
    model, x, target = build().double(), images(11, dtype=torch.float64), labels(11)
    pruner = zp.Pruner(model, composite(), x)
    found = [
        pruner.collect(list(zip(x.split(size), target.split(size))), aggregate=aggregate, progress=False)
        for size in (1, 3, 8, 11)
    ]
    for other in found[1:]:
        assert other.info == found[0].info
        assert all(torch.allclose(other[name], found[0][name], rtol=1e-10, atol=1e-12) for name in found[0])
        if 'join' not in found[0]:  # behind a group norm, what is left of a sum over space is rounding
            assert other.reliability().groups == pytest.approx(found[0].reliability().groups)


@pytest.mark.parametrize('split', [0, 4, 5, 11])
def test_merged_collectors_equal_one(device: torch.device, split: int) -> None:
    model, x, target = chain().double().to(device), images(11, dtype=torch.float64), labels(11)
    pruner = zp.Pruner(model, composite(), x.to(device))
    whole, first, second = (pruner.collector() for _ in range(3))
    for collector, part in ((whole, slice(None)), (first, slice(0, split)), (second, slice(split, None))):
        with collector:
            if len(x[part]):
                collector.update(x[part], target[part])
    expected, found = whole.compute(), first.merge(second).compute()
    assert found.info == expected.info
    assert all(apart(found[name], expected[name]) <= 1e-12 for name in expected)


def test_collectors_that_do_not_fit_are_not_merged() -> None:
    def collected(model: nn.Module, **options: Any) -> zp.relevance.Collector:
        collector = zp.Pruner(model, composite(), images()).collector(**options)
        with collector:
            collector.update(images(), labels())
        return collector

    with pytest.raises(zp.PruneError, match='different networks'):
        collected(chain()).merge(collected(seeded(Residual())))
    with pytest.raises(zp.PruneError, match=r'abs.*signed'):
        collected(chain(), aggregate='abs').merge(collected(chain(), aggregate='signed'))


def test_collector_of_the_same_names_but_other_widths_is_not_merged() -> None:
    wide = seeded(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 4)))
    narrow = seeded(nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(320, 4)))
    collectors = []
    for model in (wide, narrow):
        with zp.Pruner(model, composite(), images()).collector() as collector:
            collector.update(images(), labels())
        collectors.append(collector)
    with pytest.raises(zp.PruneError):
        collectors[0].merge(collectors[1])


def test_merging_into_an_unused_collector_keeps_the_aggregate() -> None:
    pruner = zp.Pruner(chain(), composite(), images())
    with pruner.collector() as used:
        used.update(images(), labels())
    assert pruner.collector().merge(used).compute().info == used.compute().info


def test_collector_of_another_initial_relevance_is_not_merged() -> None:
    pruner = zp.Pruner(chain(), composite(), images())
    collectors = [pruner.collector(initial=initial) for initial in ('one-hot', 'logit')]
    for collector in collectors:
        with collector:
            collector.update(images(), labels())
    with pytest.raises(zp.PruneError, match='logit'):
        collectors[0].merge(collectors[1])


def test_a_collector_resumes(device: torch.device) -> None:
    model, x, target = chain().double().to(device), images(6, dtype=torch.float64).to(device), labels(6).to(device)
    pruner = zp.Pruner(model, composite(), x)
    collector = pruner.collector()
    for part in (slice(0, 2), slice(2, 6)):
        with collector:
            collector.update(x[part], target[part])
    expected = pruner.collect([(x, target)], progress=False)
    found = collector.compute()
    assert all(apart(found[name], expected[name]) <= 1e-6 for name in expected)


# --- loaders


def loaders(x: torch.Tensor, target: torch.Tensor) -> dict[str, Callable[[], Any]]:
    pairs = list(zip(x.split(3), target.split(3)))
    dataset = torch.utils.data.TensorDataset(x, target)
    return {
        'list': lambda: pairs,
        'generator': lambda: (pair for pair in pairs),
        'iterator': lambda: iter(pairs),
        'lists as batches': lambda: [list(pair) for pair in pairs],
        'tensors': lambda: (x, target),
        'DataLoader': lambda: torch.utils.data.DataLoader(dataset, batch_size=4),
    }


@pytest.mark.parametrize('kind', list(loaders(images(1), labels(1))))
def test_loaders_lose_no_batch(kind: str) -> None:
    model, x, target = chain().double(), images(10, dtype=torch.float64), labels(10)
    pruner = zp.Pruner(model, composite(), x)
    expected = pruner.collect([(x, target)], progress=False)
    found = pruner.collect(loaders(x, target)[kind](), progress=False)
    assert found.info['samples'] == 10
    assert all(apart(found[name], expected[name]) <= 1e-10 for name in expected)


def test_prune_loses_no_batch_of_a_generator() -> None:
    model, x, target = chain(), images(10), labels(10)
    pairs = list(zip(x.split(3), target.split(3)))
    smalls = [
        zp.prune(model, composite(), loader, zp.Budget(flops=0.5), progress=False)
        for loader in (pairs, (pair for pair in pairs))
    ]
    weights = [[tensor for _, tensor in small.state_dict().items()] for small in smalls]
    assert all(torch.equal(a, b) for a, b in zip(*weights))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(images(6), labels(6)))


def test_loader_of_a_stream_without_length() -> None:
    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    assert zp.Pruner(chain(), composite(), images()).collect(loader, progress=False).info['samples'] == 6


# --- targets and initial relevance


def from_start(start: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    '''Channel relevance of the chain from a given initial relevance, read independently.'''
    model, x = chain(), images(4)
    with torch.no_grad():
        output = model(x)
    return {
        name: aggregated(values, 'abs')
        for name, values in read(model, composite(), x, start(output), ['0', '2', '5', '9']).items()
    }


def _softmax_gradient(output: torch.Tensor) -> torch.Tensor:
    logits = output.clone().requires_grad_()
    probabilities = logits.softmax(1)[range(4), labels()]
    return torch.autograd.grad(probabilities.sum(), logits)[0]


def _contrast(output: torch.Tensor) -> torch.Tensor:
    start = torch.zeros_like(output)
    for row, target in enumerate(labels().tolist()):
        rivals = [(value, column) for column, value in enumerate(output[row].tolist()) if column != target]
        start[row, target], start[row, max(rivals)[1]] = 1, -1
    return start


ONE_HOT = F.one_hot(labels(), 4)
MULTI = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]])
STARTS: dict[str, tuple[Any, Any, Callable[[torch.Tensor], torch.Tensor]]] = {
    'indices': (labels(), 'one-hot', lambda output: ONE_HOT.float()),
    'one-hot integers': (ONE_HOT, 'one-hot', lambda output: ONE_HOT.float()),
    'one-hot floats': (ONE_HOT.float(), 'one-hot', lambda output: ONE_HOT.float()),
    'boolean rows': (MULTI.bool(), 'one-hot', lambda output: MULTI.float()),
    'multi-label rows': (MULTI.float(), 'one-hot', lambda output: MULTI.float()),
    'multi-label logits': (MULTI, 'logit', lambda output: MULTI * output),
    'predicted': ('predicted', 'one-hot', lambda output: F.one_hot(output.argmax(1), 4).float()),
    'logit': (labels(), 'logit', lambda output: ONE_HOT * output),
    'softmax': (labels(), 'softmax', _softmax_gradient),
    'contrastive': (labels(), 'contrastive', _contrast),
    'function as initial': (None, torch.sigmoid, torch.sigmoid),
    'function as target': (torch.sigmoid, 'one-hot', torch.sigmoid),
}


@pytest.mark.parametrize('kind', STARTS)
def test_initial_relevance(kind: str) -> None:
    target, initial, start = STARTS[kind]
    with zp.Pruner(chain(), composite(), images()).collector('abs', initial) as collector:
        collector.update(images(), target)
    found, expected = collector.compute(), from_start(start)
    for name in expected:
        assert apart(found[name], expected[name]) <= 2e-6


def test_regression_needs_no_labels() -> None:
    pruner = zp.Pruner(chain(), composite(), images())
    expected = pruner.collect([(images(), labels())], initial=torch.ones_like, progress=False)
    for loader in ([images()], [(images(),)], images(), [{'input': images()}]):
        found = pruner.collect(loader, initial=torch.ones_like, progress=False)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ('rules', 'aggregate'),
    [
        ('epsilon_plus', 'sumabs'),
        ('epsilon_alpha2_beta1', 'sumabs'),
        ('epsilon_gamma_box', 'sumabs'),
        ('epsilon', 'abs'),
        ('guided_backprop', 'abs'),
    ],
)
def test_automatic_aggregate(rules: str, aggregate: str) -> None:
    model = seeded(
        nn.Sequential(
            *[layer for size in (3, 6, 5) for layer in (nn.Conv2d(size, {3: 6, 6: 5, 5: 4}[size], 3), nn.ReLU())],
            nn.Flatten(),
            nn.Linear(16, 4),
        )
    )
    rule = LayerMapComposite([(Activation, Pass()), (Linear, Epsilon())]) if rules == 'epsilon' else composite(rules)
    found = [
        zp.Pruner(model, rule, images()).collect([(images(), labels())], aggregate=kind, progress=False)
        for kind in ('auto', aggregate)
    ]
    assert found[0].info['aggregate'] == aggregate
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# --- inputs


class Named(nn.Module):
    '''Takes its inputs by name.'''

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, pixels: torch.Tensor, context: torch.Tensor) -> dict[str, torch.Tensor]:
        x = F.relu(self.a(pixels)).mean((2, 3))
        return {'logits': self.fc(x + F.relu(self.b(context)))}


class Words(nn.Module):
    '''Reads token numbers.'''

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.fc = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(40, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.inner(self.embed(tokens))).flatten(1))


def test_inputs_by_name() -> None:
    batch = {'pixels': images(), 'context': torch.linspace(-1, 1, 20).view(4, 5)}
    model = seeded(Named())
    found = zp.Pruner(model, None, batch).collect([(batch, labels())], aggregate='signed', progress=False)
    tuples = tuple(batch.values())
    same_by_position = zp.Pruner(model, None, tuples).collect([(tuples, labels())], aggregate='signed', progress=False)
    assert list(found) == ['a']
    assert torch.equal(found['a'], same_by_position['a'])


def test_integer_inputs() -> None:
    tokens = torch.arange(20).view(4, 5) % 11
    model = seeded(Words())
    with torch.no_grad():
        hidden = F.relu(model.inner(model.embed(tokens))).flatten(1)
        shares = (
            hidden * model.fc.weight[labels()] / model.fc(hidden)[range(4), labels()][:, None]
        )  # epsilon, but for its stabilizer
    expected = shares.view(4, 5, 8).sum(1).abs().mean(0)
    loader = [(tokens[:1], labels(1)), (tokens[1:], labels()[1:])]
    found = zp.Pruner(model, None, tokens).collect(loader, aggregate='abs', progress=False)
    assert apart(found['inner'].float(), expected) <= 1e-3


def test_relevance_of_embeddings() -> None:
    tokens = torch.arange(20).view(4, 5) % 11
    found = zp.Pruner(seeded(Words()), None, tokens).collect([(tokens, labels())], progress=False)
    assert found['embed'].shape == (6,)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_more(dtype: torch.dtype) -> None:
    model, x = chain(), images(8)
    expected = zp.Pruner(model, composite(), x).collect([(x, labels(8))], aggregate='abs', progress=False)
    half = copy.deepcopy(model).to(dtype)
    found = zp.Pruner(half, composite(), x.to(dtype)).collect(
        [(x.to(dtype), labels(8))], aggregate='abs', progress=False
    )
    assert found['0'].dtype == torch.float64
    assert apart(found['9'], expected['9']) < 0.2


# --- errors


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.first(x))
        return self.fc(self.relu(self.shared(self.relu(self.shared(x)))).mean((2, 3)))


class Unrolled(nn.Module):
    '''The same with a module for each call; the parameters are shared.'''

    def __init__(self, twice: Twice) -> None:
        super().__init__()
        self.first, self.shared, self.fc = twice.first, twice.shared, twice.fc
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.again.weight, self.again.bias = twice.shared.weight, twice.shared.bias
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relus[0](self.first(x))
        return self.fc(self.relus[2](self.again(self.relus[1](self.shared(x)))).mean((2, 3)))


@pytest.mark.parametrize('rules', ['epsilon_plus', 'epsilon_alpha2_beta1', 'epsilon'])
def test_every_call_of_a_reused_layer_has_a_rule_of_its_own(rules: str) -> None:
    twice = seeded(Twice()).double()
    unrolled = Unrolled(twice).eval()
    x, target = images(4, dtype=torch.float64), labels(4)
    left, right = (zp.Pruner(model, None if rules == 'epsilon' else composite(rules), x) for model in (twice, unrolled))
    batches = [(x[:1], target[:1]), (x[1:], target[1:])]
    found, expected = (pruner.collect(batches, progress=False) for pruner in (left, right))
    assert list(found) == list(expected)
    assert all(apart(found[name], expected[name]) <= 1e-12 for name in found)
    assert apart(left.heatmap(x, target), right.heatmap(x, target)) <= 1e-12


def test_calls_are_counted_anew_after_a_batch_that_failed() -> None:
    twice = seeded(Twice()).double()
    x, target = images(4, dtype=torch.float64), labels(4)
    pruner = zp.Pruner(twice, composite(), x)
    expected = pruner.collect([(x, target)], progress=False)
    with pruner.collector() as collector:
        with pytest.raises(zp.PruneError):
            collector.update(x[:, :2], target)
        collector.update(x, target)
    assert all(torch.equal(collector.compute()[name], expected[name]) for name in expected)


def test_a_layer_without_a_rule_may_be_called_twice() -> None:
    '''Only rules that keep tensors are confused by a second call.'''
    model = seeded(
        nn.Sequential(nn.Conv2d(3, 6, 3), relu := nn.ReLU(), nn.Conv2d(6, 5, 3), relu, nn.Flatten(), nn.Linear(80, 4))
    )
    assert len(zp.Pruner(model, composite(), images()).collect([(images(), labels())], progress=False)) == 2


def _collect(loader: Any, **options: Any) -> Any:
    return zp.Pruner(chain(), composite(), images()).collect(loader, progress=False, **options)


WITH_NAN = images().index_fill(0, torch.tensor([2]), float('nan'))
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    'no labels': (lambda: _collect([images()]), 'labels'),
    'no labels in tuples': (lambda: _collect([(images(),)]), 'labels'),
    'empty list': (lambda: _collect([]), 'empty'),
    'empty generator': (lambda: _collect(iter(())), 'empty'),
    'label too large': (
        lambda: _collect([(images(), torch.tensor([0, 1, 4, 2]))]),
        'label 4 is out of range.*4 classes',
    ),
    'label negative': (lambda: _collect([(images(), torch.tensor([0, 1, -1, 2]))]), 'label -1 is out of range'),
    'labels as real numbers': (lambda: _collect([(images(), labels().float())]), r'\(4,\).*float32'),
    'too few labels': (lambda: _collect([(images(), labels(3))]), r'\(3,\)'),
    'rows too short': (lambda: _collect([(images(), ONE_HOT[:, :3])]), r'\(4, 3\)'),
    'pair of unequal length': (lambda: _collect((images(4), labels(3))), '4 inputs and 3 labels'),
    'NaN': (lambda: _collect([(WITH_NAN, labels())]), 'not finite'),
    'infinite': (lambda: _collect([(images() / 0, labels())]), 'not finite'),
    'wrong number of channels': (lambda: _collect([(images()[:, :2], labels())]), r'\(4, 2, 8, 8\)'),
    'wrong size': (lambda: _collect([(images(size=1), labels())]), r'\(4, 3, 1, 1\)'),
    'unknown target': (lambda: _collect([(images(), 'best')]), "'best'"),
    'unknown aggregate': (lambda: _collect([(images(), labels())], aggregate='max'), "'max'.*'sumabs'"),
    'unknown criterion': (lambda: _collect([(images(), labels())], criterion='magic'), "'magic'.*'relevance'"),
    'unknown initial': (lambda: _collect([(images(), labels())], initial='logits'), "'logits'.*'one-hot'"),
    'initial of another shape': (
        lambda: _collect([images()], initial=lambda output: output[:, 0]),
        r'\(4,\).*\(4, 4\)',
    ),
    'initial that returns no tensor': (lambda: _collect([images()], initial=lambda output: 1), 'int'),
    'no iterable': (lambda: _collect(3), 'int'),
    'a dict as loader': (lambda: _collect({'x': images()}), 'dict'),
    'triples': (lambda: _collect([(images(), labels(), torch.rand(4))]), 'tuple.*x, y, _ in loader'),
    'a composite class': (lambda: zp.Pruner(chain(), EpsilonPlus, images()), 'instance'),
    'no example': (lambda: zp.Pruner(chain(), None, 'image'), 'str'),
    'no module': (lambda: zp.Pruner(chain, None, images()), 'function'),
    'empty loader for prune': (lambda: zp.prune(chain(), None, [], zp.Budget(flops=0.5), progress=False), 'empty'),
    'no sample to compute': (lambda: zp.Pruner(chain(), None, images()).collector().compute(), 'no sample'),
    'outside of with': (lambda: zp.Pruner(chain(), None, images()).collector().update(images(), labels()), 'with'),
}


@pytest.mark.parametrize('kind', BAD)
def test_bad_input(kind: str) -> None:
    action, message = BAD[kind]
    with pytest.raises(zp.PruneError, match=message):
        action()


def test_update_after_the_with_block() -> None:
    with zp.Pruner(chain(), None, images()).collector() as collector:
        collector.update(images(), labels())
    with pytest.raises(zp.PruneError, match='with'):
        collector.update(images(), labels())


def test_update_after_entering_failed() -> None:
    collector = zp.Pruner(chain(), EpsilonPlus(canonizers=[RaisingCanonizer()]), images()).collector()
    with pytest.raises(Injected), collector:
        pass
    with pytest.raises(zp.PruneError, match='with'):
        collector.update(images(), labels())


def test_a_refused_batch_is_not_counted() -> None:
    pruner = zp.Pruner(chain(), composite(), images())
    with pruner.collector() as collector:
        collector.update(images(), labels())
        for inputs, target in ((WITH_NAN, labels()), (images(), labels() + 3), (images()[:, :1], labels())):
            with pytest.raises(zp.PruneError):
                collector.update(inputs, target)
        collector.update(images(seed=1), labels())
    expected = pruner.collect([(images(), labels()), (images(seed=1), labels())], progress=False)
    found = collector.compute()
    assert found.info['samples'] == 8
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_relevance_that_is_not_finite_is_an_error() -> None:
    model = chain()
    with torch.no_grad():
        model[5].weight.fill_(float('inf'))
    with pytest.raises(zp.PruneError, match='not finite'):
        zp.Pruner(model, composite(), images()).collect([(images(), labels())], progress=False)


def test_relevance_that_arrives_nowhere_is_an_error() -> None:
    with pytest.raises(zp.PruneError):
        zp.Pruner(chain(), composite(), images()).collect([images()], initial=torch.zeros_like, progress=False)


def test_a_network_without_removable_channels_says_so() -> None:
    with pytest.raises(zp.PruneError, match='channel'):
        zp.Pruner(nn.Linear(3, 4), None, torch.ones(4, 3)).collect([(torch.ones(4, 3), labels())], progress=False)


# --- notes
@pytest.mark.parametrize('name', ['deconvnet', 'guided_backprop', 'beta_smooth'])
def test_rules_that_are_not_lrp_are_noted(name: str) -> None:
    pruner = zp.Pruner(seeded(Modular()), COMPOSITES[name](), images(2))
    with pytest.warns(zp.PruneWarning, match='no rule of LRP'):
        relevance = pruner.collect([(images(2), labels(2))], progress=False)
    assert 'not conserved' in relevance.info['notes'][0]


def test_lrp_is_not_noted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        pruner = zp.Pruner(seeded(Modular()), EpsilonPlus(), images(2))
        relevance = pruner.collect([(images(2), labels(2))], progress=False)
    assert relevance.info['notes'] == []


def test_warnings_as_errors_leave_the_composite_as_it_was() -> None:
    composite_ = COMPOSITES['guided_backprop']()
    before = composite_.canonizers
    with warnings.catch_warnings(), pytest.raises(zp.PruneWarning):
        warnings.simplefilter('error')
        zp.Pruner(seeded(Modular()), composite_, images(2)).collect([(images(2), labels(2))], progress=False)
    assert composite_.canonizers is before and not composite_.handles


# --- one composite, several passes
def test_passes_that_share_a_composite_do_not_disturb_each_other() -> None:
    model = seeded(Modular()).double()
    x, target = images(4, dtype=torch.float64), labels(4)
    pruner = zp.Pruner(model, EpsilonPlus(), x)
    expected = pruner.collect([(x[:2], target[:2]), (x[2:], target[2:])], progress=False)
    with pruner.collector() as one, pruner.collector() as other:
        one.update(x[:2], target[:2])
        other.update(x[:2], target[:2])
        pruner.heatmap(x, target)
        one.update(x[2:], target[2:])
        other.update(x[2:], target[2:])
    for collector in (one, other):
        assert all(torch.equal(collector.compute()[name], expected[name]) for name in expected)


def test_composite_in_use_on_the_users_network_stays_so() -> None:
    model, x, composite_ = seeded(Modular()), images(2), EpsilonPlus()
    pruner = zp.Pruner(model, composite_, x)
    with composite_.context(model):
        before = {name: list(module._forward_hooks) for name, module in model.named_modules()}
        zp.heatmap(seeded(Modular()), composite_, x, labels(2))
        pruner_of_another = zp.Pruner(seeded(Modular()), composite_, x)
        pruner_of_another.collect([(x, labels(2))], progress=False)
        assert before == {name: list(module._forward_hooks) for name, module in model.named_modules()}
    assert pruner.collect([(x, labels(2))], progress=False)


# --- options are checked before any data are read
def unread() -> Any:
    raise AssertionError('the loader was read')
    yield


EARLY: dict[str, tuple[dict[str, Any], str]] = {
    'aggregate': ({'aggregate': 'sum_abs'}, "aggregate='sum_abs' is unknown.*did you mean 'sumabs'"),
    'nonfinite': ({'nonfinite': 'skipp'}, "nonfinite='skipp' is unknown.*did you mean 'skip'"),
    'criterion': ({'criterion': 'relevence'}, "criterion='relevence' is unknown.*did you mean 'relevance'"),
    'initial': ({'initial': 'onehot'}, "initial='onehot' is unknown.*function of the output; did you mean 'one-hot'"),
    'rival': ({'initial': 'contrastive', 'classes': (2,)}, 'second class'),
    'classes': ({'classes': ()}, 'empty'),
    'attributor': ({'attributor': 3}, 'attributor=3'),
    'attributor of another': ({'attributor': SmoothGrad, 'criterion': 'taylor'}, "'taylor' has a formula of its own"),
    'exemplars': ({'exemplars': -1}, 'exemplars=-1'),
    'exemplars of another': ({'exemplars': 2, 'criterion': 'wanda'}, "'wanda' has no score for single samples"),
    'seed': ({'seed': 'x'}, "seed='x' is no whole number"),
    'target': ({'target': 'predictd'}, "target='predictd' is unknown.*did you mean 'predicted'"),
    'two functions': ({'target': torch.sigmoid, 'initial': torch.sigmoid}, 'both target and initial'),
}


@pytest.mark.parametrize('case', EARLY)
def test_options_are_checked_before_the_first_batch(case: str) -> None:
    options, message = EARLY[case]
    pruner = zp.Pruner(chain(), None, images())
    with pytest.raises(zp.PruneError, match=message):
        pruner.collect(unread(), progress=False, **options)
    if 'target' not in options:
        with pytest.raises(zp.PruneError, match=message):
            pruner.collector(**options)


# --- warnings
def noted(relevance: zp.Relevance, text: str) -> bool:
    return any(text in note for note in relevance.info['notes'])


@pytest.mark.parametrize('rules', ['none', 'epsilon', 'epsilon_plus', 'guided_backprop'])
def test_sums_with_sign_under_rules_that_mix_signs_are_warned_of(rules: str) -> None:
    kinds = {'none': None, 'epsilon': LayerMapComposite([*layer_map_base(), (Linear, Epsilon())]),
             'epsilon_plus': composite('epsilon_plus'), 'guided_backprop': composite('guided_backprop')}
    pruner = zp.Pruner(seeded(Mixed()), kinds[rules], images())
    with pruner.collector() as collector:
        mixes = collector.aggregate == 'abs'
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        relevance = pruner.collect((images(), labels()), aggregate='signed', progress=False)
    told = [str(warning.message) for warning in caught if "aggregate='signed'" in str(warning.message)]
    assert mixes == (rules != 'epsilon_plus') == bool(told) == noted(relevance, "aggregate='signed'")
    assert all('mix positive and negative' in text and "Use aggregate='abs' or 'auto'" in text for text in told)
    for options in ({'aggregate': 'abs'}, {'aggregate': 'auto'}, {'criterion': 'taylor', 'aggregate': 'signed'}):
        assert not noted(pruner.collect((images(), labels()), progress=False, **options), "aggregate='signed'")


@pytest.mark.parametrize('network', [chain, lambda: seeded(Residual()), lambda: seeded(Mixed())])
def test_the_paper_is_not_warned_of(network: Any) -> None:
    rules = LayerMapComposite([*layer_map_base(), (Linear, ZPlus(zero_params='bias'))])
    pruner = zp.Pruner(network(), rules, images())
    relevance = pruner.collect((images(), labels()), aggregate='signed', progress=False)
    assert not noted(relevance, "aggregate='signed'")


class Amplified(nn.Module):
    '''Multiplies what it computes by itself, which no rule conserves under a composite that knows layers alone.'''

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x * x).flatten(1)


@pytest.mark.parametrize('labelled', ['tensor', 'list', 'none'])
def test_unsound_relevance_is_warned_of_and_noted(labelled: str) -> None:
    pruner = zp.Pruner(seeded(Amplified()), LayerMapComposite([(Linear, Epsilon())]), images(6))
    batch = {'tensor': (images(6), labels(6)), 'list': (images(6), labels(6).tolist()), 'none': images(6)}[labelled]
    options = {'target': 'predicted'} if labelled == 'none' else {}
    with pytest.warns(zp.PruneWarning, match='Relevance is unsound.*created.*mul') as caught:
        relevance = pruner.collect([batch], progress=False, **options)
    assert sum('unsound' in str(warning.message) for warning in caught) == 1 and noted(relevance, 'unsound')
    for criterion in ('taylor', 'activation'):
        assert not noted(pruner.collect((images(6), labels(6)), criterion, progress=False), 'unsound')


def test_sound_relevance_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error', zp.PruneWarning)
        relevance = zp.Pruner(chain(), None, images()).collect((images(), labels()), progress=False)
    assert relevance.info['notes'] == []
