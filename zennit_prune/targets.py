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
from .labels import Field
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
    '''A value, by the call that makes it, with its label fields, and the layers that it depends on linearly.'''

    site: Site
    fields: list[Field]
    layers: list[Repairable] = field(default_factory=list)


def find_targets(run: Run, model: nn.Module) -> list[Target]:
    '''The targets in the order of the forward pass; layers whose parameters are also used elsewhere have none.'''
    modules = dict(model.named_modules())
    reads = Counter(value for operation in run.operations for value in operation.reads)
    readers: defaultdict[int, list[FunctionCall]] = defaultdict(list)
    for call in run.functions:
        for argument in call.arguments:
            if argument.active and call.results and argument.value not in call.results:
                readers[argument.value].append(call)

    def outside(value: int, call: FunctionCall) -> int:
        '''How often a value is read by other calls.'''
        return reads[value] - sum(operation.reads.count(value) for operation in call.operations)

    def alone(call: FunctionCall) -> bool:
        return not any(outside(argument.value, call) for argument in call.arguments if not argument.active)

    found: dict[Site, Target] = {}
    for call in run.functions:
        if not _is_layer(call) or not alone(call):
            continue
        layer, last = Repairable(call.site), call
        while outside(last.results[0], last) == 1 and len(readers[last.results[0]]) == 1:
            reader = readers[last.results[0]][0]
            if last is call and _normalizes(reader, call, modules) and alone(reader):
                layer.batch_norm, last = reader.site.module, reader
                continue
            if _adds(reader) and not _overwrites(reader, call.arguments[0].value):
                last = reader
            break
        fields = next(iter(last.operations[-1].outputs), [])
        found.setdefault(last.site, Target(last.site, fields)).layers.append(layer)
    order = {call.site: number for number, call in enumerate(run.functions)}
    return sorted(found.values(), key=lambda target: order[target.site])


def _is_layer(call: FunctionCall) -> bool:
    if call.site.function not in LAYERS or call.active != [0] or len(call.arguments) < 2:
        return False
    return call.site.function == 'linear' or len(call.arguments[0].shape) == len(call.arguments[1].shape)


def _normalizes(call: FunctionCall, layer: FunctionCall, modules: dict[str, nn.Module]) -> bool:
    '''Whether a call is a BatchNorm with statistics, over the channels that the layer brings forth.'''
    return (call.site.function == 'batch_norm' and call.active == [0] and _has_statistics(modules.get(call.site.module))
            and (layer.site.function != 'linear' or len(call.arguments[0].shape) == 2))


def _has_statistics(module: nn.Module | None) -> bool:
    return isinstance(module, BatchNorm) and module.running_mean is not None  # type: ignore[union-attr]


def _adds(call: FunctionCall) -> bool:
    operations = [operation for operation in call.operations if any(operation.active)]
    shapes = {argument.shape for argument in call.arguments}
    return (len(call.active) == 2 and len(shapes) == 1 and len(operations) == 1 and operations[0].name == 'add'
            and not operations[0].scalars)


def _overwrites(call: FunctionCall, value: int) -> bool:
    return call.in_place is not None and call.arguments[call.in_place].value == value
