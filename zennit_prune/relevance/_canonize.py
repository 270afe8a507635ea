'''``GraphCanonizer``: make any traced network fit for LRP.

Zennit assigns rules to modules. This canonizer shows it the functions that a network calls between its modules: an
addition written ``x + y`` becomes a :class:`zennit.layer.Sum`, ``F.relu`` an ``nn.ReLU``, ``F.linear`` an
``nn.Linear``, to which the composite's own rules apply; ``_functions.py`` has the table. A BatchNorm is merged into the
linear layer before or behind it, for as long as relevance is attributed.
'''
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from zennit.canonizers import Canonizer
from zennit.core import Hook
from zennit.layer import Sum
from zennit.rules import Pass
from zennit.types import Activation, AvgPool, BatchNorm, ConvolutionTranspose, Linear, MaxPool

from ..errors import names_options
from ..tracing._calls import CallCounter, Site
from ..tracing._recorded import Operation
from ..tracing._trace import Recording, record
from ..util._networks import tensors_in, unwrapped
from ._functions import Equivalent, Layer, equivalents

PLAIN_FORWARDS = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d,
                                           nn.ConvTranspose2d, nn.ConvTranspose3d)}
LINEAR = {'convolution', 'addmm', 'mm'}


class Pair(NamedTuple):
    '''The names of a linear layer and of the BatchNorm behind it, or ``before`` it, with no other reader between.'''

    linear: str
    batch_norm: str
    before: bool = False


def pairs(operations: Sequence[Operation], calls: Mapping[str, int]) -> list[Pair]:
    '''Find all pairs in a trace, given the number of calls of each module; a BatchNorm behind a layer comes first.'''
    readers = Counter(value for operation in operations for value in operation.reads)
    writer = {value: operation for operation in operations for value in operation.writes[:1]}
    found: list[Pair] = []
    for before in (False, True):
        paired = {name for pair in found for name in (pair.linear, pair.batch_norm)}
        for operation in operations:
            for value in operation.reads:
                source = writer.get(value)
                if source is None or readers[value] != 1:
                    continue
                linear, batch_norm = (operation, source) if before else (source, operation)
                if linear.name not in LINEAR or 'batch_norm' not in batch_norm.name:
                    continue
                names = linear.site.module, batch_norm.site.module
                if all(calls.get(name) == 1 for name in names) and (not before or names[1] not in paired):
                    found.append(Pair(*names, before))
    return found


def computes_plainly(linear: Any) -> bool:
    '''Return whether a layer of torch's own uses its weight parameter as it is.'''
    return linear._parameters.get('weight') is not None and type(linear).forward in PLAIN_FORWARDS


def mergeable(linear: Any, batch_norm: Any, before: bool) -> bool:
    '''Return whether a BatchNorm can be merged into a linear layer exactly and was not merged before.'''
    if not isinstance(linear, Linear) or not isinstance(batch_norm, BatchNorm) or batch_norm.running_mean is None:
        return False
    transposed = isinstance(linear, ConvolutionTranspose)
    exact = not (transposed and linear.groups > 1)
    if before:  # the shift of a BatchNorm does not reach the border that a convolution pads with zeros
        padding = getattr(linear, 'padding', 'valid')
        exact = not transposed and (padding == 'valid' or set(padding) == {0})
    return exact and computes_plainly(linear) and not _is_identity(batch_norm)


def _is_identity(batch_norm: Any) -> bool:
    '''Return whether another canonizer has merged this BatchNorm already.'''
    ones, zeros = (batch_norm.running_var, batch_norm.weight), (batch_norm.running_mean, batch_norm.bias)
    return all(value is not None and bool((value == number).all())
               for values, number in ((ones, 1), (zeros, 0)) for value in values)


class MergedBatchNorm(Canonizer):
    '''Fold a BatchNorm into a linear layer and make it the identity, until it is removed.'''

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        raise NotImplementedError('made by GraphCanonizer')

    def register(self, linear: Any, batch_norm: Any, before: bool = False) -> None:
        self._saved = [(module, dict(module._parameters), dict(module._buffers)) for module in (linear, batch_norm)]
        self._eps = batch_norm, batch_norm.eps
        mean, variance = batch_norm.running_mean, batch_norm.running_var
        with torch.no_grad():
            scale = (variance + batch_norm.eps).rsqrt()
            if batch_norm.weight is not None:
                scale = scale * batch_norm.weight
            shift = (0 if batch_norm.bias is None else batch_norm.bias) - mean * scale
            merge = _merged_before if before else _merged_behind
            _replace(linear, merge(linear, scale, shift))
            _replace(batch_norm, {'weight': torch.ones_like(mean), 'bias': torch.zeros_like(mean),
                                  'running_mean': torch.zeros_like(mean), 'running_var': torch.ones_like(variance)})
        batch_norm.eps = 0.0

    def remove(self) -> None:
        for module, parameters, buffers in self._saved:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        batch_norm, eps = self._eps
        batch_norm.eps = eps


def _merged_behind(linear: Any, scale: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
    shape = [1] * linear.weight.dim()
    shape[1 if isinstance(linear, ConvolutionTranspose) else 0] = -1
    bias = 0 if linear.bias is None else linear.bias
    return {'weight': linear.weight * scale.reshape(shape), 'bias': bias * scale + shift}


def _merged_before(linear: Any, scale: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs, inputs, *kernel = linear.weight.shape
    groups = getattr(linear, 'groups', 1)
    weight = linear.weight.reshape(groups, outputs // groups, inputs, *kernel)
    factors, shifts = (values.reshape(groups, 1, inputs, *[1] * len(kernel)) for values in (scale, shift))
    bias = (weight * shifts).flatten(2).sum(2).flatten() + (0 if linear.bias is None else linear.bias)
    return {'weight': (weight * factors).reshape(linear.weight.shape), 'bias': bias}


def _replace(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    '''Swap tensors by name, parameters for new parameters, so that the old objects stay as they are.'''
    for name, value in values.items():
        if name in module._buffers:
            module._buffers[name] = value
        else:
            module._parameters[name] = nn.Parameter(value, requires_grad=False)


class GraphCanonizer(Canonizer):
    '''Canonize everything that the trace of a network shows and other canonizers did not canonize.

    Put it last among the canonizers: Zennit reverts them first to last, so one that merges BatchNorm after this one
    would restore the weights that this one computed. A function whose equivalent module gets no rule from the composite
    runs as it is.

    Parameters
    ----------
    model: torch.nn.Module
        The network that will be attributed, or one of the same structure; it is traced, not changed.
    example: torch.Tensor, tuple or dict
        An input, as for :func:`zennit_prune.trace`; values do not matter.

    Attributes
    ----------
    batch_norms: list of Pair
        The BatchNorms to merge, each with its linear layer.
    functions: dict of Site to Equivalent
        The calls of functions that become modules.
    calls: dict of str to int
        The number of calls of each module.
    reached: set of int
        The values of the trace that relevance arrives at; gates are held constant, so that none arrives there.
    fed: set of (str, int)
        The calls of modules, by name and number, that read what depends on the network's inputs.

    Raises
    ------
    PruneError
        If the network cannot be traced.

    References
    ----------
    Zennit's canonizers: Anders et al., "Software for Dataset-wide XAI" (arXiv 2106.13200). Rules for attention:
    Achtibat et al., "AttnLRP" (arXiv 2402.05602), section 3.

    Examples
    --------
    >>> import torch
    >>> from zennit.composites import EpsilonPlus
    >>> class Net(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.one, self.norm = torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2)
    ...     def forward(self, x):
    ...         return torch.relu(self.norm(self.one(x)) + x).sum((2, 3))
    >>> model, x = Net().eval(), torch.rand(1, 1, 3, 3, requires_grad=True)
    >>> canonizer = GraphCanonizer(model, x)
    >>> canonizer.batch_norms
    [Pair(linear='one', batch_norm='norm', before=False)]
    >>> [site.function for site in canonizer.functions if site.module == '']
    ['add', 'relu', 'sum']
    >>> with EpsilonPlus(canonizers=[canonizer]).context(model) as modified:
    ...     relevance, = torch.autograd.grad(modified(x).sum(), x)
    >>> relevance.shape
    torch.Size([1, 1, 3, 3])
    '''

    @names_options()
    def __init__(self, model: nn.Module, example: Any):
        super().__init__()
        self._find(record(unwrapped(model), example))

    @classmethod
    def from_recording(cls, recording: Recording) -> GraphCanonizer:
        '''Make the canonizer from an existing trace.

        Parameters
        ----------
        recording: Recording
            The trace of the network that will be attributed.

        Returns
        -------
        GraphCanonizer
            A canonizer for this network and its copies.

        Examples
        --------
        >>> from zennit_prune.tracing._trace import record
        >>> canonizer = GraphCanonizer.from_recording(record(model, example))
        >>> [site.function for site in canonizer.functions if site.module == 'pool']
        ['adaptive_avg_pool2d']
        '''
        canonizer = cls.__new__(cls)
        Canonizer.__init__(canonizer)
        canonizer._find(recording)
        return canonizer

    def _find(self, recording: Recording) -> None:
        run = recording.runs['eval']
        self.calls: dict[str, int] = {}
        for module, call in run.outputs:
            self.calls[module] = max(self.calls.get(module, 0), call + 1)
        self.fed = {(operation.site.module, operation.site.call) for operation in run.operations
                    if any(operation.active)}
        self.batch_norms: list[Pair] = pairs(run.operations, self.calls)
        found = equivalents(run.functions, run.operations[-1].reads)
        self.functions: dict[Site, Equivalent] = {call.site: equivalent for call, equivalent in found}
        held = {id(operation): {argument.value for position, argument in enumerate(call.arguments)
                                if position not in equivalent.signals}
                for call, equivalent in found for operation in call.operations}
        self.reached = set(run.operations[-1].reads)
        for operation in reversed(run.operations[:-1]):
            if self.reached.intersection(operation.writes):
                self.reached.update(set(operation.reads) - held.get(id(operation), set()))

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        '''Canonize ``root_module``; return the instances whose ``remove`` reverts it.'''
        modules = dict(root_module.named_modules())
        instances: list[Canonizer] = []
        for pair in self.batch_norms:
            linear, batch_norm = modules.get(pair.linear), modules.get(pair.batch_norm)
            if mergeable(linear, batch_norm, pair.before):
                instances.append(MergedBatchNorm())
                instances[-1].register(linear, batch_norm, pair.before)
        functions = {site: equivalent for site, equivalent in self.functions.items()
                     if not has_its_own_rule(modules.get(site.module))}
        if functions:
            first = next((site for site, found in self.functions.items() if isinstance(found, Layer)), None)
            instances.append(FunctionalModules())
            instances[-1].register(root_module, functions, first)
        return instances[::-1]  # a layer that took two BatchNorms has to give back the last one first

    def register(self) -> None:
        '''Do nothing: :meth:`apply` makes the instances.'''

    def remove(self) -> None:
        '''Do nothing: the instances revert themselves.'''

    def copy(self) -> GraphCanonizer:
        '''Return another canonizer for the same network.'''
        copy = GraphCanonizer.__new__(GraphCanonizer)
        copy.__dict__.update(self.__dict__)
        return copy


def has_its_own_rule(module: nn.Module | None) -> bool:
    '''Return whether a composite's rule for a module's type fits what the module computes.'''
    if isinstance(module, Linear):
        return computes_plainly(module)
    return isinstance(module, (Activation, AvgPool, BatchNorm, MaxPool, Sum)) and not _takes_several(module)


def _takes_several(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


def rule_of(hook: Any) -> Hook | None:
    '''Return the rule that a hook of a module belongs to.'''
    rule = getattr(hook, 'rule', getattr(hook, '__self__', None))
    return rule if isinstance(rule, Hook) else None


def rules_of(module: nn.Module) -> list[Hook]:
    '''Return the rules that a composite registered with a module.'''
    rules = map(rule_of, module._forward_hooks.values())
    return list({id(rule): rule for rule in rules if rule is not None}.values())


def lends_its_rules(module: nn.Module | None) -> bool:
    '''Return whether a layer computes with another weight than its parameter, so that rules belong to that call.'''
    return isinstance(module, Linear) and not computes_plainly(module)


def needs_gradient(arguments: Any) -> bool:
    '''Return whether a call takes part in the gradient graph: gradients are enabled, and an argument needs one.'''
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(arguments))


def unregister(module: nn.Module, rules: list[Hook]) -> None:
    '''Remove rules from a module before it runs.'''
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if any(rule_of(hook) is rule for rule in rules):
                del hooks[key]


class FunctionalModules(Canonizer):
    '''Run functions through modules of their own, to which the composite's rules apply.

    The modules are children of those that call the functions while the composite looks for modules; they are removed
    before the network runs, since it may iterate over children. While the root's ``forward`` runs, a
    ``TorchFunctionMode`` sends the calls to them.
    '''

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        raise NotImplementedError('made by GraphCanonizer')

    def register(self, root_module: nn.Module, functions: Mapping[Site, Equivalent], first: Site | None) -> None:
        '''Make the modules of ``functions``; ``first`` is the network's first layer, which composites look for.'''
        self._root = root_module
        self._children: list[tuple[nn.Module, str]] = []
        self._functions: dict[Site, tuple[Equivalent, list[Any]]] = {}
        self._lent: list[Hook] = []  # a hook lives as long as someone holds it
        named = dict(root_module.named_modules())
        for site, equivalent in functions.items():
            is_first = site == first and not lends_its_rules(named.get(site.module))
            host = _host(named, '' if is_first else site.module)
            if host is not None:
                self._functions[site] = equivalent, equivalent.modules()
                for module in self._functions[site][1]:
                    name = f'canonizer_{site.function.strip("_")}_{len(self._children)}'
                    others = list(host._modules) if is_first else []
                    host.add_module(name, module)
                    for other in others:  # to the end
                        host._modules[other] = host._modules.pop(other)
                    self._children.append((host, name))
        self._had_forward = root_module.__dict__.get('forward')
        forward = root_module.forward

        def canonized_forward(*args: Any, **kwargs: Any) -> Any:
            self._take_out_children()
            with _Diversion(root_module, self._with_rules()):
                return forward(*args, **kwargs)

        root_module.forward = self._forward = canonized_forward

    def _with_rules(self) -> dict[Site, tuple[Equivalent, list[Any]]]:
        '''Return the functions that the composite has rules for; rules that do not fit their module are removed.'''
        self._lend_rules()
        ruled = {site: found for site, found in self._functions.items() if any(map(rules_of, found[1]))}
        named = dict(self._root.named_modules())
        for name in {site.module for site in ruled}.intersection(named):
            rules = rules_of(named[name])
            if _takes_several(named[name]) and all(isinstance(rule, Pass) for rule in rules):
                unregister(named[name], rules)
        return ruled

    def _lend_rules(self) -> None:
        '''Apply the rule of a layer that computes its weights where these are used.'''
        named = dict(self._root.named_modules())
        users: defaultdict[str, list[Any]] = defaultdict(list)
        for site, (equivalent, modules) in self._functions.items():
            if isinstance(equivalent, Layer) and lends_its_rules(named.get(site.module)):
                users[site.module] += modules
        for name, modules in users.items():
            rules = rules_of(named[name])
            unregister(named[name], rules)
            for position, module in enumerate(modules if rules else ()):
                unregister(module, rules_of(module))
                lent = [rule.copy() if position else rule for rule in rules]
                self._lent += lent
                for rule in lent:
                    rule.register(module)

    def _take_out_children(self) -> None:
        for host, name in self._children:
            host._modules.pop(name, None)

    def remove(self) -> None:
        self._take_out_children()
        if self._root.__dict__.get('forward') is not self._forward:
            return  # another canonizer has put back what was there before this one
        if self._had_forward is None:
            del self._root.forward
        else:
            self._root.forward = self._had_forward


def _host(modules: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    '''Return the module, or the nearest around it (else the first inside) that does not run its children in a row.'''
    parts = name.split('.') if name else []
    around = ['.'.join(parts[:length]) for length in range(len(parts), -1, -1)]
    inside = [other for other in modules if other.startswith(f'{name}.' if name else '')]
    for candidate in (*around, *inside):
        module = modules.get(candidate)
        if module is not None and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return module
    return None


class _Diversion(CallCounter):
    '''Send the calls of functions to their modules, except where no rule applies.

    That is inside a module that has a rule of its own, where gradients are disabled (under ``torch.no_grad``, inside
    the forward of a ``torch.autograd.Function``), and where no argument needs a gradient.
    '''

    def __init__(self, root: nn.Module, functions: Mapping[Site, tuple[Equivalent, list[Any]]]):
        super().__init__(root)
        self._functions = functions
        self._owners = {name for name, module in root.named_modules() if rules_of(module)}

    def intercept(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        found = self._functions.get(self.site)
        if (found is None or kwargs.get('out') is not None or not needs_gradient((args, kwargs))
                or any(frame.module in self._owners for frame in self._stack)):
            return func(*args, **kwargs)
        equivalent, modules = found
        return equivalent(modules, func, args, kwargs)
