'''Does relevance rank channels by what they do, whatever the network puts out?

One small network of each kind is trained on data made up for it: a binary classifier with one logit, a regression,
several labels, segmentation with one and with several classes, a classifier of tokens, two outputs, and a detector in
the manner of YOLO. Each channel is then removed alone, and its true effect is the mean absolute change of the outputs
that the task reads, on samples that were not trained on. The table has Spearman's rank correlation of these effects
with the scores from 64 other samples, over the channels of all groups: the median over seeds and the smallest. Beside
it stand the scores of a start that does not fit: from positive samples alone, from another output, from coordinates.

    python benchmarks/starts.py [--seeds 3] [kind ...]
'''
from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp
from zennit_prune.graph import ChannelGraph
from zennit_prune.relevance import detections
from zennit_prune.relevance._relevance import spearman

TRAIN, REFERENCES, TEST = 256, 64, 128
STEPS = 200
SIZE, KINDS, TOKENS, WORDS = 12, 3, 12, 9
PATTERNS = (lambda row, column: row % 2, lambda row, column: column % 2, lambda row, column: (row + column) % 2)


def scenes(number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    '''Draw images of stripes and chequers of 4 x 4 pixels, which kinds each has, and the kind of each cell (or -1).'''
    images = 0.3 * torch.randn(number, 3, SIZE, SIZE, generator=generator)
    cells = torch.where(torch.rand(number, 3, 3, generator=generator) < 0.3,
                        torch.randint(0, KINDS, (number, 3, 3), generator=generator), -1)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing='ij')
    for image, row, column in (cells >= 0).nonzero().tolist():
        kind = int(cells[image, row, column])
        pattern = PATTERNS[kind](rows, columns).float() * (1 + torch.rand((), generator=generator))
        images[image, kind:, 4 * row:4 * row + 4, 4 * column:4 * column + 4] += pattern
    present = torch.stack([(cells == kind).flatten(1).any(1) for kind in range(KINDS)], 1).float()
    return images, present, cells


def pixels(cells: torch.Tensor) -> torch.Tensor:
    '''Return the kind of each pixel, 0 where there is none.'''
    return (cells + 1).repeat_interleave(4, 1).repeat_interleave(4, 2)


def words(number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    '''Draw sequences of token numbers, and a class for each token that depends on it and on the one before.'''
    tokens = torch.randint(0, WORDS, (number, TOKENS), generator=generator)
    return tokens, (tokens + F.pad(tokens, (1, 0))[:, :-1]) % KINDS


def body() -> list[nn.Module]:
    return [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()]


def classifier(outputs: int) -> nn.Module:
    return nn.Sequential(*body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 12), nn.ReLU(),
                         nn.Linear(12, outputs))


class Tagger(nn.Module):
    '''Token numbers to (batch, tokens, classes).'''

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(WORDS, 12), nn.Conv1d(12, 16, 3, padding=1)
        self.hidden, self.out = nn.Linear(16, 16), nn.Linear(16, KINDS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(self.embedding(tokens).transpose(1, 2))).transpose(1, 2)
        return self.out(F.relu(self.hidden(x)))


class Two(nn.Module):
    '''A number and scores of kinds, from one body.'''

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*body(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.counter = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))
        self.kinds = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, KINDS))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.body(x)
        return {'count': self.counter(x), 'kind': self.kinds(x)}


def detector() -> nn.Module:
    '''Images to (batch, 4 coordinates + objectness + kinds, 3, 3).'''
    return nn.Sequential(*body(), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(16, 5 + KINDS, 1))


def detection_loss(output: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    there = cells >= 0
    loss = F.binary_cross_entropy_with_logits(output[:, 4], there.float())
    boxes = output[:, :4].movedim(1, -1)[there]
    kinds = output[:, 5:].movedim(1, -1)[there]
    return loss + F.cross_entropy(kinds, cells[there]) + (boxes - 0.5).square().mean()


Samples = tuple[torch.Tensor, Any]


@dataclass
class Kind:
    '''A kind of network: what it is trained on, and where its relevance starts.'''

    build: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], Samples]
    loss: Callable[[Any, Any], torch.Tensor]
    start: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Any], torch.Tensor] = lambda output: output
    label: Callable[[Any], Any] = lambda target: target
    others: Mapping[str, tuple[Callable[[Any], Any], Mapping[str, Any]]] = field(default_factory=dict)


def drawn(target: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[[int, torch.Generator], Samples]:
    def draw(number: int, generator: torch.Generator) -> Samples:
        images, present, cells = scenes(number, generator)
        return images, target(present, cells)

    return draw


def amount(present: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    return (cells + 1.0).flatten(1).sum(1, keepdim=True) / 4 - 1


bce = F.binary_cross_entropy_with_logits
KINDS_OF_NETWORKS: dict[str, Kind] = {
    'binary, one logit': Kind(
        lambda: classifier(1), drawn(lambda present, cells: present[:, 0]), lambda output, y: bce(output[:, 0], y),
        others={'positives alone': (lambda y: y[:, None], {'initial': 'weights'})}),
    'regression': Kind(
        lambda: classifier(1), drawn(amount), F.mse_loss, {'initial': 'value'},
        others={'targets as weights': (lambda y: y, {'initial': 'weights'})}),
    'several labels': Kind(lambda: classifier(KINDS), drawn(lambda present, cells: present), bce),
    'segmentation, one class': Kind(
        lambda: nn.Sequential(*body(), nn.Conv2d(12, 1, 1)), drawn(lambda present, cells: (cells >= 0).float()),
        lambda output, y: bce(output[:, 0], pixels(y.long() - 1).float()), label=lambda y: pixels(y.long() - 1),
        others={'positives alone': (lambda y: pixels(y.long() - 1)[:, None].float(), {'initial': 'weights'})}),
    'segmentation': Kind(
        lambda: nn.Sequential(*body(), nn.Conv2d(12, KINDS + 1, 1)), drawn(lambda present, cells: cells),
        lambda output, y: F.cross_entropy(output, pixels(y)), label=pixels),
    'tokens': Kind(Tagger, words, lambda output, y: F.cross_entropy(output.flatten(0, 1), y.flatten())),
    'two outputs': Kind(
        Two, drawn(lambda present, cells: (present, amount(present, cells))),
        lambda output, y: bce(output['kind'], y[0]) + F.mse_loss(output['count'], y[1]), {'output': 'kind'},
        lambda output: output['kind'], lambda y: y[0],
        others={'the other output': (lambda y: None, {'output': 'count', 'initial': 'value'})}),
    'detector': Kind(
        detector, drawn(lambda present, cells: cells), detection_loss,
        {'initial': detections(slice(5, None), 1, objectness=4)}, lambda output: output[:, 4:],
        others={'all numbers of a box': (lambda y: None, {'initial': 'value'})}),
}


def trained(kind: Kind, seed: int) -> tuple[nn.Module, Samples, Samples]:
    '''Train a network; return it with the references and the test samples.'''
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = kind.build()
    x, y = kind.draw(TRAIN, generator)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        kind.loss(model(x), y).backward()
        optimizer.step()
    return model.eval(), kind.draw(REFERENCES, generator), kind.draw(TEST, generator)


def effects(kind: Kind, model: nn.Module, graph: ChannelGraph, x: torch.Tensor) -> torch.Tensor:
    '''Return the mean absolute change of the output without each channel, over the channels of all groups.'''
    with torch.no_grad():
        whole = kind.read(model(x))
        return torch.stack([
            (kind.read(zp.Plan(graph, {group.name: [channel]}).masked(model)(x)) - whole).abs().mean()
            for group in graph.groups for channel in range(group.size)])


def correlations(kind: Kind, seed: int) -> dict[str, float]:
    '''Return the rank correlation of scores with true effects, for the right start and for others.'''
    model, (references, target), (x, _) = trained(kind, seed)
    pruner = zp.Pruner(model, None, references[:1], progress=False)
    true = effects(kind, model, pruner.graph, x)
    starts = {'right': (kind.label, kind.start), **kind.others}
    found = {}
    for name, (label, start) in starts.items():
        relevance = pruner.collect([(references, label(target))], **start)
        scored = [group for group in pruner.graph.groups if group.name in relevance]
        at = torch.cat([torch.full((group.size,), group in scored) for group in pruner.graph.groups])
        found[name] = spearman(torch.cat([relevance[group.name] for group in scored]), true[at].double())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kinds', nargs='*', metavar='kind')
    parser.add_argument('--seeds', type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print('| network | start | median | smallest |\n| --- | --- | --- | --- |')
    for name in options.kinds or KINDS_OF_NETWORKS:
        runs = [correlations(KINDS_OF_NETWORKS[name], seed) for seed in range(options.seeds)]
        for start in runs[0]:
            values = [run[start] for run in runs]
            print(f'| {name} | {start} | {statistics.median(values):.2f} | {min(values):.2f} |', flush=True)


if __name__ == '__main__':
    main()
