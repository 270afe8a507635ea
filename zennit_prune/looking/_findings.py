'''What a report says about a plan, in numbers and words: costs, layers, groups, checks, and where it comes from.'''
from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import PruneError
from ..graph._graph import ChannelGraph
from ..planning._cost import cost_model
from ..planning._plan import Plan
from ..planning._storage import load, save
from ..relevance._relevance import Relevance, Reliability
from ..surgery._verify import compare, evaluating, noise
from ..util._fingerprint import described
from ..util._networks import output_tensors, unique_tensors, unwrapped
from . import _charts as charts
from ._charts import Chart, amount
from ._subject import Subject

UNITS = {'params': 'Parameters', 'flops': 'FLOPs per sample', 'bytes': 'Bytes', 'channels': 'Removable channels'}
PREFLIGHT = 8  # inputs that relevance is followed through


@dataclass(frozen=True)
class Amount:
    '''A line of the summary; ``share`` is what is left, where that can be said.'''

    name: str
    before: str
    after: str
    share: float | None = None


@dataclass(frozen=True)
class Layer:
    '''What a layer costs, before and after.'''

    name: str
    flops: tuple[float, float]
    params: tuple[float, float]


@dataclass(frozen=True)
class Group:
    '''A group of channels: its ranking, where scores are known, and what the plan does to it.'''

    name: str
    size: int
    left: int
    together: list[str]
    readers: list[str]
    stability: float | None
    ranking: Chart | None

    @property
    def gone(self) -> int:
        '''How many channels go.'''
        return self.size - self.left


@dataclass(frozen=True)
class Check:
    '''A question and its answer; ``good`` is None where it was not asked.'''

    name: str
    good: bool | None
    text: str


@dataclass(frozen=True)
class Costs:
    '''Where parameters and FLOPs go.'''

    layers: list[Layer]
    widths: Chart
    flops: Chart
    params: Chart
    others: tuple[float, float]


def amounts(plan: Plan, evaluation: Mapping[str, tuple[Any, Any]] | None) -> list[Amount]:
    '''The summary: what the plan leaves, and what was measured elsewhere.

    Raises
    ------
    PruneError
        If ``evaluation`` is no mapping of names to pairs.
    '''
    costs = cost_model(plan.graph)
    counts = costs.counts(plan.removed)
    found = []
    for unit, name in UNITS.items():
        before, after = costs(unit, 0 * counts), costs(unit, counts)
        found.append(Amount(name, f'{before:,.0f}', f'{after:,.0f}', after / before if before else None))
    if plan.timing is not None and plan.timing.original and plan.timing.pruned:
        slow, fast = (f'{1e3 * seconds:.3g} ms' for seconds in (plan.timing.original, plan.timing.pruned))
        found.append(Amount(f'Latency on {plan.timing.device}', slow, fast, plan.timing.left))
    if not isinstance(evaluation or {}, Mapping):
        raise PruneError(f'evaluation={evaluation!r}: give what was measured by name, before and after, e.g. '
                         "{'accuracy on 5,000 test images': (0.935, 0.921)}.")
    for label, pair in (evaluation or {}).items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise PruneError(f'evaluation[{label!r}]={pair!r}: give two values, before and after.')
        was, is_now = ('–' if value is None else value if isinstance(value, str) else f'{value:.4g}' for value in pair)
        found.append(Amount(str(label), was, is_now))
    return found


def layer_costs(plan: Plan) -> Costs:
    '''Widths of the groups; FLOPs and parameters of the layers that compute, in execution order.'''
    costs = cost_model(plan.graph)
    counts = costs.counts(plan.removed)
    found = {unit: (costs.by_layer(unit, 0 * counts), costs.by_layer(unit, counts)) for unit in ('flops', 'params')}
    names = list(found['flops'][0])
    layers = [Layer(name or '(the network itself)', *((before.get(name, 0.0), after.get(name, 0.0))
                                                      for before, after in found.values())) for name in names]
    others = [sum(value for name, value in side.items() if name not in found['flops'][0]) for side in found['params']]
    drawn = []
    for unit, word in (('flops', 'FLOPs'), ('params', 'parameters')):
        pairs = [getattr(layer, unit) for layer in layers]
        says = [f'{layer.name}: {amount(before)} → {amount(after)} {word}' + f' ({after / (before or 1):.0%} left)'
                for layer, (before, after) in zip(layers, pairs)]
        drawn.append(charts.columns([layer.name for layer in layers], [after for _, after in pairs],
                                    [before for before, _ in pairs], says))
    groups = plan.graph.groups
    left = [group.size - count for group, count in zip(groups, counts.astype(int).tolist())]
    says = [f'{group.name}: {kept} of {group.size} channels stay ({kept / group.size:.0%})'
            for group, kept in zip(groups, left)]
    widths = charts.columns([group.name for group in groups], [kept / group.size for group, kept in zip(groups, left)],
                            [1.0] * len(groups), says, 1.0, '100%')
    return Costs(layers, widths, drawn[0], drawn[1], (others[0], others[1]))


def group_findings(plan: Plan, relevance: Relevance | None, reliability: Reliability | None) -> list[Group]:
    '''All groups in execution order.'''
    found = []
    for group in plan.graph.groups:
        gone = set(plan.removed.get(group.name, ()))
        drawn = None
        if relevance is not None and group.name in relevance:
            scores = relevance[group.name].tolist()
            if len(scores) != group.size:
                raise PruneError(f'relevance has {len(scores)} scores for group {group.name!r}, which has {group.size} '
                                 'channels: it is of another network.')
            drawn = charts.ranking(scores, [position in gone for position in range(group.size)])
        found.append(Group(group.name, group.size, group.size - len(gone), group.layers('producer')[1:],
                           group.layers('consumer'), None if reliability is None else
                           reliability.groups.get(group.name), drawn))
    return found


def stability_chart(groups: Sequence[Group]) -> Chart | None:
    '''A column for each group: the rank correlation between halves of the references.'''
    known = [group for group in groups if group.stability is not None]
    if not known:
        return None
    return charts.columns([group.name for group in known], [max(group.stability or 0.0, 0.0) for group in known],
                          says=[f'{group.name}: {group.stability:.2f} between halves' for group in known], top=1.0)


def locked_by_reason(graph: ChannelGraph) -> dict[str, list[str]]:
    '''Locked layers under the reason they share.'''
    found: dict[str, list[str]] = {}
    for layer, reason in graph.locked.items():
        found.setdefault(reason, []).append(layer)
    return found


def checks(pruner: Subject, plan: Plan, small: nn.Module | None, x: Any, target: Any) -> list[Check]:
    '''Is the plan exact, does its network survive a file, is relevance sound? A failure is an answer, too.'''
    model, graph, built = pruner.model, plan.graph, [unwrapped(small)] if small is not None else []

    def exact() -> str:
        pruned = plan.apply(model, verify=False, progress=False)
        built.append(pruned)
        error = compare(graph, model, pruned, plan.removed, graph._recording.example.fitted(model))
        return (f'Proven on the structure; on noise, the pruned network differs from the masked original by '
                f'{error:.2g} of the largest output.')

    def survives() -> str:
        with tempfile.TemporaryDirectory() as folder:
            network = built[0]
            save(network, plan, Path(folder) / 'small.safetensors')
            again = load(model, Path(folder) / 'small.safetensors')
            size = (Path(folder) / 'small.safetensors').stat().st_size
        tensors = [unique_tensors(one) for one in (network, again)]
        equal = all(torch.equal(value.cpu(), tensors[1][name].cpu()) for name, value in tensors[0].items())
        args, kwargs = noise(graph._recording.example.fitted(model), 0)
        with torch.no_grad(), evaluating(network), evaluating(again):
            outputs = [output_tensors(one(*args, **kwargs)) for one in (network, again)]
        close = all(torch.allclose(a, b, 1e-3, 1e-4) for a, b in zip(*outputs))  # sums may be taken in another order
        if not equal or not close:
            raise PruneError('The network that was saved and loaded is another one.')
        return f'Saved and loaded: every tensor is equal to the bit, and it computes the same; {size:,} bytes on disk.'

    def sound() -> str:
        count = min(PREFLIGHT, len(x))
        found = pruner.preflight(x[:count], 'predicted' if target is None else target[:count])
        if found.problems:
            raise PruneError(' '.join(found.problems))
        return f'Followed through the network for {count} images: no operation makes or loses any.'

    empty = 'The plan is empty: nothing goes.'
    found = [_asked('The plan is exact', exact if plan.removed else empty)]
    file = survives if built else 'There is no network to save.'
    found.append(_asked('Its network survives a file', file if plan.removed else empty))
    unseen = 'Give x= to follow it through the network.'
    found.append(_asked('Relevance is conserved', sound if x is not None else unseen))
    return found


def _asked(name: str, question: Callable[[], str] | str) -> Check:
    if isinstance(question, str):
        return Check(name, None, question)
    try:
        return Check(name, True, question())
    except PruneError as error:
        return Check(name, False, str(error))


def origin(pruner: Subject, plan: Plan, relevance: Relevance | None, small: nn.Module | None) -> dict[str, str]:
    '''What it takes to make the same again: versions, rules, seeds, and sums to compare with.'''
    from .. import __version__

    found = {'zennit_prune': __version__, 'Zennit': version('zennit'), 'PyTorch': torch.__version__}
    found['Python'] = f'{platform.python_version()} on {platform.system()} {platform.machine()}'
    found['Network'] = f'{type(pruner.model).__module__}.{type(pruner.model).__qualname__}'
    found['Rules'] = str(described(pruner.composite))
    for key, value in (relevance.info if relevance is not None else {}).items():
        found[f'Relevance: {key}'] = value if isinstance(value, str) else json.dumps(value, default=str)
    found['SHA-256 of the weights'] = weights_sum(pruner.model)
    if small is not None:
        found["SHA-256 of the pruned network's weights"] = weights_sum(small)
    found['SHA-256 of plan.json'] = hashlib.sha256(plan_text(plan).encode()).hexdigest()
    return found


def plan_text(plan: Plan) -> str:
    '''What :meth:`Plan.save` writes.'''
    return json.dumps(plan.to_dict(), indent=1) + '\n'


def weights_sum(model: nn.Module) -> str:
    '''The SHA-256 sum over names, types, shapes and bytes of ``state_dict()``, in its order.'''
    digest = hashlib.sha256()
    for name, tensor in unwrapped(model).state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
