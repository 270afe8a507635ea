'''Evaluation and training mode: both are proven, and what they share is worked out once.'''
from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp
from zennit_prune.tracing._recorded import distinct
from zennit_prune.util._networks import set_mode

Forward = Callable[['Net', torch.Tensor], torch.Tensor]


class Net(nn.Module):
    '''Twelve channels between two convolutions: a trial removes a third of them, eight are left.'''

    def __init__(self, between: Forward):
        super().__init__()
        self.first, self.norm, self.drop = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Dropout(0.5)
        self.second = nn.Conv2d(12, 4, 1)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.between(self, self.norm(self.first(x)))))


def traced(between: Forward) -> zp.graph.ChannelGraph:
    return zp.trace(Net(between).eval(), torch.zeros(1, 3, 8, 8))


# each is right in one mode, or at twelve channels, or at eight
WRONG: dict[str, Forward] = {
    'train only': lambda net, x: x.view(-1, 12, 6, 6) if net.training else x,
    'train only, beside dropout': lambda net, x: net.drop(x.view(-1, 12, 6, 6)) if net.training else x,
    'the same at twelve': lambda net, x: net.drop(x.reshape(-1, 12 if net.training else x.shape[1], 36)).unflatten(
        2, (6, 6)),
    'the same at eight': lambda net, x: x * float(x.shape[1] if net.training else 8),
    'the same at eight, beside dropout': lambda net, x: net.drop(x) * float(x.shape[1] if net.training else 8),
    'evaluation only': lambda net, x: x if net.training else x * x.shape[1] ** 0.5,
    'picked in training': lambda net, x: net.drop(x) + x[:, :1] if net.training else x,
}


@pytest.mark.parametrize('name', WRONG)
def test_channels_that_one_mode_counts_stay(name: str) -> None:
    graph = traced(WRONG[name])
    channels = sum(group.size for group in graph.groups)
    assert 'first' in graph.locked and channels < 12 and (channels == 0 or name == 'picked in training')


@pytest.mark.parametrize('between', [
    lambda net, x: x, lambda net, x: net.drop(x), lambda net, x: net.drop(x) * 0.5 + x if net.training else x])
def test_modes_that_differ_in_what_no_channel_counts_can_be_pruned(between: Forward) -> None:
    graph = traced(between)
    assert [group.size for group in graph.groups] == [12] and 'first' not in graph.locked


def test_the_second_mode_repeats_what_the_first_one_did() -> None:
    '''Its operations share what the first mode stated, and number values of their own.'''
    recording = traced(lambda net, x: net.drop(x) + net.drop(x))._recording
    first, second = (recording.runs[mode].operations for mode in ('eval', 'train'))
    known = {id(operation.outputs): operation for operation in first}
    repeated = [operation for operation in second if id(operation.outputs) in known]
    assert {'convolution', 'add', 'relu'} <= {operation.name for operation in repeated}
    assert all(operation.site == known[id(operation.outputs)].site for operation in repeated)
    written = {value for operation in second for value in operation.writes}
    assert all(value in written for operation in repeated if operation.name == 'relu' for value in operation.reads)
    assert 'native_batch_norm' not in {operation.name for operation in repeated}  # statistics of the batch
    kept = distinct([*first, *second])
    assert [id(operation) for operation in kept[:len(first)]] == list(map(id, first))
    assert not {'convolution', 'add', 'relu', 'native_batch_norm'} & {
        operation.name for operation in kept[len(first):]}


def test_each_call_is_recorded_where_it_is() -> None:
    recording = traced(lambda net, x: net.drop(F.gelu(F.gelu(x))))._recording
    for run in recording.runs.values():
        sites = [operation.site for operation in run.operations if operation.name == 'gelu']
        assert [site.ordinal for site in sites] == [0, 1]


class Branches(nn.Module):
    '''One layer reads one of two in each mode, at the same place and in the same shape.'''

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.left(x), self.right(x)
        return self.last(F.relu(left if self.training else right))


def test_what_one_mode_reads_elsewhere_is_pruned_along() -> None:
    graph = zp.trace(Branches().eval(), torch.zeros(1, 3, 4, 4))
    assert [group.layers('producer') for group in graph.groups] == [['left', 'right']]


def test_operations_that_state_something_else_are_kept() -> None:
    recording = traced(lambda net, x: x)._recording
    operation = next(operation for operation in recording.operations if operation.name == 'convolution')
    other = operation.repeated([1], [2])
    assert other.states_the_same(operation)
    other.outputs, other.ties = list(operation.outputs), [*operation.ties]
    assert other.states_the_same(operation)
    other.inputs = [list(reversed(found)) for found in operation.inputs]
    assert not other.states_the_same(operation)
    other.inputs = operation.inputs
    for ties in (operation.ties[:-1], [(right[::-1], left) for left, right in operation.ties]):
        other.ties = ties
        assert not other.states_the_same(operation)
        assert len(distinct([operation, other])) == 2
    other.ties, other.locks = operation.ties, [(labels, 'else') for labels, _ in operation.locks]
    assert other.locks and not other.states_the_same(operation)


class Frozen(nn.BatchNorm2d):
    '''Never trains.'''

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


@pytest.mark.parametrize('kind', [nn.BatchNorm2d, Frozen])
def test_modes_are_set_as_the_modules_want(kind: type[nn.Module]) -> None:
    network, like = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(kind(4))) for _ in range(2))
    for training in (False, True):
        set_mode(network, training)
        like.train(training)
        assert [module.training for module in network.modules()] == [module.training for module in like.modules()]
    assert like[1][0].training == (kind is nn.BatchNorm2d)


class Dropping(nn.Module):
    '''Draws on the CPU, and has a second output, when it is trained; a batch of one has too few values then.'''

    def __init__(self, decide: Callable[[torch.Tensor], object] = lambda x: None) -> None:
        super().__init__()
        self.conv, self.norm, self.decide = nn.Conv2d(3, 8, 3), nn.BatchNorm1d(8), decide
        self.head, self.side = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> object:
        x = self.conv(x).mean((2, 3))
        if not self.training:
            return self.head(self.norm(x))
        self.decide(x)
        x = self.norm(x * (torch.rand(len(x), 1) > 0.1))
        return self.head(x), self.side(x)


def test_training_that_needs_values_is_traced_on_them() -> None:
    model = Dropping().eval()
    graph = zp.trace(model, torch.zeros(1, 3, 8, 8))
    assert [group.size for group in graph.groups] == [8] and not graph._recording.untraced
    assert any('traced on real tensors' in note for note in graph.notes)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        small = zp.Plan(graph, {'conv': [0, 1]}).apply(model)
    assert [tensor.shape for tensor in small.train()(torch.randn(3, 3, 8, 8))] == [(3, 4), (3, 4)]


def raising(x: torch.Tensor) -> None:
    raise RuntimeError('targets are missing')


@pytest.mark.parametrize(('decide', 'reason'), [(lambda x: float(x.sum()), 'uses a value'), (raising, 'targets are')])
def test_training_that_cannot_be_traced_is_warned_of(decide: Callable[[torch.Tensor], object], reason: str) -> None:
    model = Dropping(decide).eval()
    graph = zp.trace(model, torch.zeros(1, 3, 8, 8))
    assert graph._recording.example.device == 'meta' and any(reason in note for note in graph.notes)
    with pytest.warns(zp.PruneWarning, match=f'not traced in training mode .*{reason}'):
        assert zp.Plan(graph, {'conv': [0]}).apply(model)(torch.randn(2, 3, 8, 8)).shape == (2, 4)
