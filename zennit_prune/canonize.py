'''Make any traced network fit for LRP: merge BatchNorm, and give functional additions and average pools their rules.

Zennit assigns rules to modules. This canonizer shows it what a network does between its modules: an addition written
``x + y`` becomes a :class:`zennit.layer.Sum`, a mean over space an average pool, to which the composite's
own rules apply.
'''
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from zennit.canonizers import Canonizer
from zennit.layer import Sum
from zennit.types import AvgPool, BatchNorm, ConvolutionTranspose, Linear

from .calls import CallCounter, Site
from .networks import unwrapped
from .trace import Recording, record

PLAIN_FORWARDS = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d,
                                           nn.ConvTranspose2d, nn.ConvTranspose3d)}
LINEAR = {'convolution', 'addmm', 'mm'}
AVERAGES = {'mean', *(f'{adaptive}avg_pool{rank}d' for adaptive in ('', 'adaptive_') for rank in (1, 2, 3))}
ADDITIONS = {'add', 'add_', '__add__', '__iadd__', '__radd__'}


class GraphCanonizer(Canonizer):
    '''Canonize whatever the trace of a network shows and other canonizers did not touch.

    Parameters
    ----------
    model: torch.nn.Module
        The network that will be attributed, or one of the same structure; it is traced, not changed.
    example: torch.Tensor, tuple or dict
        As for :func:`zennit_prune.trace`.

    Notes
    -----
    Put it last among the canonizers: Zennit reverts them first to last, so one that merges BatchNorm after this one
    would put back what this one had made.

    Examples
    --------
    >>> composite = EpsilonPlus(canonizers=[GraphCanonizer(model, example)])
    >>> with composite.context(model) as modified_model:
    ...     output = modified_model(input)
    '''

    def __init__(self, model: nn.Module, example: Any):
        super().__init__()
        self._find(record(unwrapped(model), example))

    @classmethod
    def from_recording(cls, recording: Recording) -> GraphCanonizer:
        '''Use a trace that has been made already.'''
        canonizer = cls.__new__(cls)
        Canonizer.__init__(canonizer)
        canonizer._find(recording)
        return canonizer

    def _find(self, recording: Recording) -> None:
        operations = recording.runs['eval'].operations
        self.calls: dict[str, int] = {}
        for module, call in recording.runs['eval'].outputs:
            self.calls[module] = max(self.calls.get(module, 0), call + 1)
        readers: dict[int, int] = {}
        for operation in operations:
            for value in operation.reads:
                readers[value] = readers.get(value, 0) + 1
        writer = {value: operation for operation in operations for value in operation.writes}
        self.batch_norms: list[tuple[str, str]] = []
        self.functions: dict[Site, Callable[[], nn.Module]] = {}
        for operation in operations:
            if 'batch_norm' in operation.name:
                linear = writer.get(operation.reads[0])
                names = ('', '')
                if linear is not None and linear.name in LINEAR:
                    names = (linear.site.module, operation.site.module)
                if all(self.calls.get(name) == 1 for name in names) and readers[operation.reads[0]] == 1:
                    self.batch_norms.append(names)
            elif (operation.name == 'add' and operation.site.function in ADDITIONS
                  and operation.active[:2] == [True, True]):
                self.functions[operation.site] = Sum
            elif operation.site.function in AVERAGES and operation.active[:1] == [True] and any(operation.outputs):
                self.functions[operation.site] = Average

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        '''Merge and split in ``root_module``; returns the instances whose ``remove`` reverts it.'''
        modules = dict(root_module.named_modules())
        instances: list[Canonizer] = []
        for linear, batch_norm in self.batch_norms:
            pair = modules.get(linear), modules.get(batch_norm)
            if _mergeable(*pair):
                instances.append(MergedBatchNorm())
                instances[-1].register(*pair)
        if self.functions:
            instances.append(FunctionalModules())
            instances[-1].register(root_module, self.functions)
        return instances

    def register(self) -> None:
        '''Nothing to do: :meth:`apply` makes the instances.'''

    def remove(self) -> None:
        '''Nothing to do: the instances revert themselves.'''

    def copy(self) -> GraphCanonizer:
        '''Another canonizer for the same network.'''
        copy = GraphCanonizer.__new__(GraphCanonizer)
        copy.__dict__.update(self.__dict__)
        return copy


def _mergeable(linear: Any, batch_norm: Any) -> bool:
    '''Whether the layer uses its weight parameter as it is, and the BatchNorm running statistics.'''
    if not isinstance(linear, Linear) or not isinstance(batch_norm, BatchNorm) or batch_norm.running_mean is None:
        return False
    plain = linear._parameters.get('weight') is not None and type(linear).forward in PLAIN_FORWARDS
    grouped = isinstance(linear, ConvolutionTranspose) and linear.groups > 1
    return plain and not grouped and not _is_identity(batch_norm)


def _is_identity(batch_norm: Any) -> bool:
    '''Whether another canonizer has merged this BatchNorm already.'''
    ones, zeros = (batch_norm.running_var, batch_norm.weight), (batch_norm.running_mean, batch_norm.bias)
    return all(value is not None and bool((value == number).all())
               for values, number in ((ones, 1), (zeros, 0)) for value in values)


class MergedBatchNorm(Canonizer):
    '''Fold a BatchNorm into the linear layer before it and make it the identity, until it is removed.'''

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        raise NotImplementedError('made by GraphCanonizer')

    def register(self, linear: Any, batch_norm: Any) -> None:
        self._saved = [(module, dict(module._parameters), dict(module._buffers)) for module in (linear, batch_norm)]
        self._eps = batch_norm, batch_norm.eps
        mean, variance = batch_norm.running_mean, batch_norm.running_var
        with torch.no_grad():
            scale = (variance + batch_norm.eps).rsqrt()
            if batch_norm.weight is not None:
                scale = scale * batch_norm.weight
            shape = [1] * linear.weight.dim()
            shape[1 if isinstance(linear, ConvolutionTranspose) else 0] = -1
            bias = (0 if linear.bias is None else linear.bias) - mean
            bias = bias * scale + (0 if batch_norm.bias is None else batch_norm.bias)
            _replace(linear, {'weight': linear.weight * scale.reshape(shape), 'bias': bias})
            _replace(batch_norm, {'weight': torch.ones_like(mean), 'bias': torch.zeros_like(mean),
                                  'running_mean': torch.zeros_like(mean), 'running_var': torch.ones_like(variance)})
        batch_norm.eps = 0.0

    def remove(self) -> None:
        for module, parameters, buffers in self._saved:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        batch_norm, eps = self._eps
        batch_norm.eps = eps


def _replace(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    '''Swap tensors by name, parameters for new parameters, so that the old objects stay as they are.'''
    for name, value in values.items():
        if name in module._buffers:
            module._buffers[name] = value
        else:
            module._parameters[name] = nn.Parameter(value, requires_grad=False)


class Average(nn.AdaptiveAvgPool2d):
    '''The average that a functional call takes, as a module of the kind that composites know.'''

    def __init__(self) -> None:
        super().__init__(1)
        self.function: Callable[[torch.Tensor], torch.Tensor] = super().forward

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.function(input)


class FunctionalModules(Canonizer):
    '''Run functional additions and average pools through modules of their own, to which the composite's rules apply.

    The modules (``zennit.layer.Sum``, :class:`Average`) are children of those that call the functions, so that the
    composite sees them; while the root's ``forward`` runs, a ``TorchFunctionMode`` sends the calls there.
    '''

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        raise NotImplementedError('made by GraphCanonizer')

    def register(self, root_module: nn.Module, sites: Mapping[Site, Callable[[], nn.Module]]) -> None:
        self._root = root_module
        self._children: list[tuple[nn.Module, str]] = []
        named = dict(root_module.named_modules())
        modules: dict[Site, nn.Module] = {}
        for site, make in sites.items():
            host = _host(named, site.module)
            if host is not None and not isinstance(named.get(site.module), AvgPool):  # which has a rule of its own
                name = f'canonizer_{site.function.strip("_")}_{len(self._children)}'
                modules[site] = make()
                host.add_module(name, modules[site])
                self._children.append((host, name))
        self._had_forward = root_module.__dict__.get('forward')
        forward = root_module.forward

        def canonized_forward(*args: Any, **kwargs: Any) -> Any:
            with _Diversion(root_module, modules):
                return forward(*args, **kwargs)

        root_module.forward = self._forward = canonized_forward

    def remove(self) -> None:
        for host, name in self._children:
            delattr(host, name)
        if self._root.__dict__.get('forward') is not self._forward:
            return  # another canonizer has put back what was there before this one
        if self._had_forward is None:
            del self._root.forward
        else:
            self._root.forward = self._had_forward


def _host(modules: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    '''The module itself, or the nearest around it (else the first inside) that does not run its children in a row.'''
    parts = name.split('.') if name else []
    around = ['.'.join(parts[:length]) for length in range(len(parts), -1, -1)]
    inside = [other for other in modules if other.startswith(f'{name}.' if name else '')]
    for candidate in (*around, *inside):
        module = modules.get(candidate)
        if module is not None and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return module
    return None


class _Diversion(CallCounter):
    def __init__(self, root: nn.Module, modules: Mapping[Site, nn.Module]):
        super().__init__(root)
        self._modules = modules

    def intercept(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        module = self._modules.get(self.site)
        operands = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if isinstance(module, Sum) and len(operands) == 2 and kwargs.get('alpha', 1) == 1 and 'out' not in kwargs:
            result = module(torch.stack(torch.broadcast_tensors(*operands), dim=-1))
            return operands[0].copy_(result) if func.__name__ == 'add_' else result
        if isinstance(module, Average) and len(operands) == 1:
            rest, options = args[bool(args):], {key: value for key, value in kwargs.items() if key != 'input'}
            module.function = lambda x: func(x, *rest, **options)
            return module(*operands)
        return func(*args, **kwargs)
