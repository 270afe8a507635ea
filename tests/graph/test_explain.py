'''What people read: which channels are coupled and why, what stays and why, how much is within reach.'''
from __future__ import annotations

import pytest
import torch
import torchvision
from small import seeded
from torch import nn

import zennit_prune as zp


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1, bias=False)
        self.side = nn.Conv2d(3, 4, 1, bias=False)
        self.deep = nn.Conv2d(8, 8, 1, groups=8, bias=False)
        self.last = nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x)
        h = self.deep(h) + self.last(h.relu())
        return self.head(torch.cat([h, self.side(x).softmax(1)], 1).mean((2, 3)))


@pytest.fixture
def graph() -> zp.graph.ChannelGraph:
    return zp.trace(seeded(Net()), torch.zeros(1, 3, 6, 6))


def test_reach_is_counted_by_hand(graph: zp.graph.ChannelGraph) -> None:
    prunable = {'stem': 24, 'deep': 8, 'last': 64, 'head': 8 * 5}
    whole = {**prunable, 'side': 12, 'head': 12 * 5}
    assert graph.reach.params == pytest.approx(sum(prunable.values()) / sum(whole.values()))
    positions = {'stem': 36, 'deep': 36, 'last': 36, 'side': 36, 'head': 1}
    work = [sum(numbers[name] * positions[name] for name in numbers) for numbers in (prunable, whole)]
    assert graph.reach.flops == pytest.approx(work[0] / work[1])
    assert graph.reach.channels == pytest.approx(16 / (8 + 8 + 4 + 5))


def test_print_says_what_ties_and_what_locks(graph: zp.graph.ChannelGraph) -> None:
    lines = str(graph).splitlines()
    assert 'ChannelGraph(1 groups, 8 removable channels); within reach: 81.0% of the parameters' in lines[0]
    stream = next(line for line in lines if line.startswith('stem'))
    assert 'last' in stream and 'head' in stream and 'add in the network itself' in stream
    assert next(line for line in lines if line.startswith('side')).endswith(
        'softmax runs over it (_softmax in the network itself)')
    assert any(line.startswith('head') and 'output of the network' in line for line in lines)


def test_couplings_go_through_followers(graph: zp.graph.ChannelGraph) -> None:
    '''``stem`` meets ``last`` only behind the depthwise convolution, which produces no channels of its own.'''
    said = graph.why('last')
    assert "last holds the 8 channels of group 'stem'" in said
    assert said.count('coupled by') == 1 and 'coupled by add in the network itself' in said


def test_why_of_a_reader_names_what_of_its_inputs_must_stay(graph: zp.graph.ChannelGraph) -> None:
    said = graph.why('head')
    assert "head reads the 8 channels of group 'stem'" in said
    assert 'head: output channels are locked: it is an output of the network' in said
    assert '4 of 12 indices along dimension 1 of head.weight stay: ' in said
    assert 'kernel' not in graph.why('stem')
    with pytest.raises(zp.PruneError, match="there is no group 'nowhere'"):
        graph.why('nowhere')


def test_residual_network() -> None:
    graph = zp.trace(torchvision.models.resnet18(), torch.zeros(1, 3, 64, 64))
    said = graph.why('layer2.0.conv2')
    assert 'produced by layer2.0.conv2, layer2.0.downsample.0, layer2.1.conv2' in said
    assert 'coupled by add in layer2.0, add in layer2.1' in said
    assert 'coupled by' not in graph.why('layer2.0.conv1').split('layer2.0.conv1 reads')[0]
    assert 0.99 < graph.reach.params < 1 and 0.99 < graph.reach.flops <= 1


def test_grouped_convolutions_balance_their_own_blocks() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mixed = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2)
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.mixed(self.stem(x)).mean((2, 3)))

    graph = zp.trace(seeded(Grouped()), torch.zeros(1, 3, 4, 4))
    assert 'in 2 blocks that must lose equally many, for convolution in mixed' in graph.why('stem')
    assert 'blocks' in str(graph) and 'coupled by convolution' not in graph.why('stem')
    assert {group.name: group.size for group in graph.groups} == {'stem': 8, 'mixed': 8}
