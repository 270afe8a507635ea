'''What each layer is to be repaired for: the value that its output becomes before anything nonlinear reads it.

That is the output of its BatchNorm, or, where it is added to something else, the sum: a branch then makes up for the
error of the shortcut, too.
'''
from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from torch import nn
from zennit.types import BatchNorm

from .calls import Site
from .recorded import FunctionCall
from .trace import Run

LAYERS = {'linear', 'conv1d', 'conv2d', 'conv3d'}


@dataclass
class Repairable:
    '''A layer whose output, perhaps after a BatchNorm (the name of the module), is part of a target.'''

    site: Site
    batch_norm: str | None = None


@dataclass
class Target:
    '''A value, by the call that makes it, and the layers that it depends on linearly.'''

    site: Site
    layers: list[Repairable] = field(default_factory=list)


def find_targets(run: Run, model: nn.Module) -> list[Target]:
    '''The targets in the order of the forward pass; layers whose weight is used several times have none.'''
    uses = Counter(call.arguments[1].value for call in run.functions if _is_layer(call))
    readers: defaultdict[int, list[FunctionCall]] = defaultdict(list)
    for call in run.functions:
        for argument in call.arguments:
            if argument.active and call.results and argument.value not in call.results:
                readers[argument.value].append(call)
    reads = Counter(value for operation in run.operations for value in operation.reads)
    found: dict[Site, Target] = {}
    for call in run.functions:
        if not _is_layer(call) or uses[call.arguments[1].value] > 1 or call.site.call:
            continue
        layer = Repairable(call.site)
        value, site = call.results[0], call.site
        while reads[value] == 1 and len(readers[value]) == 1:
            reader = readers[value][0]
            module = dict(model.named_modules()).get(reader.site.module)
            if reader.site.function == 'batch_norm' and _has_statistics(module) and layer.batch_norm is None:
                layer.batch_norm = reader.site.module
                value, site = reader.results[0], reader.site
            elif _adds(reader):
                site = reader.site
                break
            else:
                break
        found.setdefault(site, Target(site)).layers.append(layer)
    order = {call.site: number for number, call in enumerate(run.functions)}
    return sorted(found.values(), key=lambda target: order[target.site])


def _is_layer(call: FunctionCall) -> bool:
    return call.site.function in LAYERS and call.active == [0] and len(call.arguments) > 1


def _has_statistics(module: nn.Module | None) -> bool:
    return isinstance(module, BatchNorm) and module.running_mean is not None  # type: ignore[union-attr]


def _adds(call: FunctionCall) -> bool:
    operations = [operation for operation in call.operations if any(operation.active)]
    shapes = {argument.shape for argument in call.arguments}
    return (len(call.active) == 2 and len(shapes) == 1 and len(operations) == 1 and operations[0].name == 'add'
            and not operations[0].scalars)
