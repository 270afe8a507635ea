'''The facts that a report states about a plan: costs, layers, groups, checks, and how to make the plan again.'''
from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from zennit.core import Composite

from ..errors import PruneError
from ..graph._graph import ChannelGraph
from ..planning._cost import cost_model
from ..planning._plan import Plan
from ..planning._storage import load, save
from ..relevance._initial import Initial
from ..relevance._outputs import Output
from ..relevance._preflight import Preflight
from ..relevance._relevance import Relevance, Reliability
from ..surgery._verify import compare, evaluating, noise
from ..util._fingerprint import described
from ..util._networks import output_tensors, unique_tensors, unwrapped
from . import _charts as charts
from ._charts import Chart, amount

UNITS = {'params': 'Parameters', 'flops': 'FLOPs per sample', 'bytes': 'Bytes', 'channels': 'Removable channels'}
PREFLIGHT = 8  # inputs whose relevance is checked for conservation


class Subject(Protocol):
    '''A network, the rules that explain it, and its removable channels: :class:`zennit_prune.Pruner` is one.'''

    model: nn.Module
    composite: Composite
    graph: ChannelGraph
    progress: bool

    def preflight(self, x: Any, target: Any = 'predicted', initial: Initial = 'one-hot', *, output: Output = None
                  ) -> Preflight:
        '''Check whether relevance is sound on this network.'''


class Curved(Protocol):
    '''Accuracy over budget, as a sweep holds it.'''

    unit: str
    original: float

    @property
    def evaluated(self) -> str:
        '''The name of the function that evaluated.'''

    def curves(self) -> Mapping[tuple[str, str], Mapping[float, Any]]:
        '''Return the means over the seeds, by criterion and repair, then by budget.'''


@dataclass(frozen=True)
class Amount:
    '''A quantity before and after pruning; ``share`` is the fraction that is left, None where there is none.'''

    name: str
    before: str
    after: str
    share: float | None = None


@dataclass(frozen=True)
class Layer:
    '''FLOPs and parameters of a layer, each before and after pruning.'''

    name: str
    flops: tuple[float, float]
    params: tuple[float, float]


@dataclass(frozen=True)
class Group:
    '''A dependency group: its size before and after, its layers, and its ranking where scores are known.'''

    name: str
    size: int
    left: int
    together: list[str]
    readers: list[str]
    reliability: float | None  # split-half rank correlation
    ranking: Chart | None

    @property
    def removed(self) -> int:
        '''The number of channels to be removed.'''
        return self.size - self.left


@dataclass(frozen=True)
class Check:
    '''A check and its outcome; ``good`` is None where it was not run.'''

    name: str
    good: bool | None
    text: str


@dataclass(frozen=True)
class Costs:
    '''Widths of groups, and FLOPs and parameters of layers, before and after pruning.'''

    layers: list[Layer]
    widths: Chart
    flops: Chart
    params: Chart
    others: tuple[float, float]


def amounts(plan: Plan, evaluation: Mapping[str, tuple[Any, Any]] | None) -> list[Amount]:
    '''Return the rows of the summary: costs before and after, and what was measured elsewhere.

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
    '''Return the widths of the groups, and FLOPs and parameters of the layers that compute, in execution order.'''
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
    says = [f'{group.name}: {kept} of {group.size} channels kept ({kept / group.size:.0%})'
            for group, kept in zip(groups, left)]
    widths = charts.columns([group.name for group in groups], [kept / group.size for group, kept in zip(groups, left)],
                            [1.0] * len(groups), says, 1.0, '100%')
    return Costs(layers, widths, drawn[0], drawn[1], (others[0], others[1]))


def group_findings(plan: Plan, relevance: Relevance | None, reliability: Reliability | None) -> list[Group]:
    '''Return the dependency groups in execution order.'''
    found = []
    for group in plan.graph.groups:
        removed = set(plan.removed.get(group.name, ()))
        drawn = None
        if relevance is not None and group.name in relevance:
            scores = relevance[group.name].tolist()
            if len(scores) != group.size:
                raise PruneError(f'relevance has {len(scores)} scores for group {group.name!r}, which has {group.size} '
                                 'channels: it is of another network.')
            drawn = charts.ranking(scores, [position in removed for position in range(group.size)])
        found.append(Group(group.name, group.size, group.size - len(removed), group.layers('producer')[1:],
                           group.layers('consumer'), None if reliability is None else
                           reliability.groups.get(group.name), drawn))
    return found


def reliability_chart(groups: Sequence[Group]) -> Chart | None:
    '''Draw the split-half rank correlation of the scores of each group as a column.'''
    known = [group for group in groups if group.reliability is not None]
    if not known:
        return None
    return charts.columns([group.name for group in known], [max(group.reliability or 0.0, 0.0) for group in known],
                          says=[f'{group.name}: {group.reliability:.2f}' for group in known], top=1.0)


def locked_by_reason(graph: ChannelGraph) -> dict[str, list[str]]:
    '''Return the locked layers by the reason that they share.'''
    found: dict[str, list[str]] = {}
    for layer, reason in graph.locked.items():
        found.setdefault(reason, []).append(layer)
    return found


def checks(pruner: Subject, plan: Plan, small: nn.Module | None, x: Any, target: Any,
           initial: Initial = 'one-hot', output: Output = None) -> list[Check]:
    '''Check that the plan is exact, that a saved network loads unchanged, and that relevance is conserved.

    A check that fails is reported, not raised.
    '''
    model, graph, built = pruner.model, plan.graph, [unwrapped(small)] if small is not None else []

    def exact() -> str:
        pruned = plan.apply(model, verify=False, progress=False)
        built.append(pruned)
        error = compare(graph, model, pruned, plan.removed, graph._recording.example.fitted(model))
        return (f'Proven on the structure. On random inputs, outputs of the pruned network differ from those of the '
                f'masked original by at most {error:.2g} of the largest output.')

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
            raise PruneError('The network that was loaded differs from the one that was saved.')
        return f'Saved and loaded: all tensors are equal to the bit, and outputs agree; {size:,} bytes on disk.'

    def sound() -> str:
        count = min(PREFLIGHT, len(x))
        found = pruner.preflight(x[:count], 'predicted' if target is None else target[:count], initial, output=output)
        if found.problems:
            raise PruneError(' '.join(found.problems))
        return f'Checked on {count} images: no operation adds or loses relevance.'

    empty = 'The plan is empty: no channel is removed.'
    found = [_asked('The plan is exact', exact if plan.removed else empty)]
    file = survives if built else 'There is no network to save.'
    found.append(_asked('The pruned network can be saved and loaded', file if plan.removed else empty))
    unseen = 'Give x= to check it on these images.'
    found.append(_asked('Relevance is conserved', sound if x is not None else unseen))
    return found


def _asked(name: str, question: Callable[[], str] | str) -> Check:
    '''Return the outcome of a check, or the reason why it was not run.'''
    if isinstance(question, str):
        return Check(name, None, question)
    try:
        return Check(name, True, question())
    except PruneError as error:
        return Check(name, False, str(error))


def origin(pruner: Subject, plan: Plan, relevance: Relevance | None, small: nn.Module | None) -> dict[str, str]:
    '''Return versions, rules, seeds and checksums: all that is needed to make the plan again and compare.'''
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
    '''Return the text of the file that :meth:`Plan.save` writes.'''
    return json.dumps(plan.to_dict(), indent=1) + '\n'


def weights_sum(model: nn.Module) -> str:
    '''Return the SHA-256 checksum over names, types, shapes and bytes of ``state_dict()``, in its order.'''
    digest = hashlib.sha256()
    for name, tensor in unwrapped(model).state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
