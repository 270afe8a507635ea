'''``Preflight``: follow relevance from the output to the input, and name the operations that do not conserve it.

LRP conserves relevance: an operation passes on in full what it receives. Where an operation has no rule that does so,
relevance multiplies or vanishes, and channels are ranked by where they sit instead of by what they do. Relevance that
the rules of layers absorb (for biases and stabilizers, or because z-plus finds nothing positive to give to) is part of
LRP, and so is the constant term of a softmax. The two are told apart: absorbed relevance is counted at the layers, the
conservation error at the operations between them.
'''
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, Node
from zennit.core import Composite
from zennit.layer import Sum
from zennit.types import Activation, AvgPool, BatchNorm, MaxPool

from ..errors import PruneError
from ..tracing._calls import CallCounter, Frame, Site
from ..tracing._recorded import FunctionCall
from ..tracing._trace import Recording, Run
from ..util._arguments import call_network
from ..util._display import table
from ..util._networks import map_tensors, tensors_in
from ._attribute import attributing, check_depends, custom_function, differentiable, graph_of, propagate
from ._canonize import GraphCanonizer, needs_gradient, rules_of
from ._functions import Equivalent
from ._initial import Origin
from ._nonfinite import why_not_finite, without_nan

TOLERANCE = 0.05  # of the initial relevance, created or lost between layers
ROUNDING = 1e-3  # of the L1 norm, with which the tolerance grows: of large shares that cancel, little is left
FADED = 0.01  # of the initial relevance, in absolute values
EXPLODED = 1e4  # times the initial relevance, in absolute values
CHOOSING = {'cat', 'stack', 'where', 'maximum', 'minimum', 'masked_fill'}  # each element is one of the input's
BACKWARD = 'the backward of '  # a user's torch.autograd.Function
NEW_STAGE = {'convolution', 'addmm', 'mm', 'bmm', 'add', 'cat'}


class Stage(NamedTuple):
    '''A tensor that all relevance flows through; numbers are relative to the initial relevance.

    Attributes
    ----------
    name: str
        The module that returns it, or the function and its module; the first is ``'output'``, the last ``'input'``.
    sum: float
        The sum of relevance: that at the output, which is 1 unless the start cancels, minus ``absorbed`` plus
        ``conservation_error``.
    l1_norm: float
        The sum of absolute relevance; a sum of 1 can hide a large norm.
    absorbed: float
        Relevance absorbed by the rules of the layers behind, by biases and stabilizers.
    conservation_error: float
        Relevance created (or, negative, lost) by the operations between these layers: 0 on a sound network.
    '''

    name: str
    sum: float
    l1_norm: float
    absorbed: float
    conservation_error: float


@dataclass
class Account:
    '''The relevance that one call received and passed on, relative to the initial relevance.

    Attributes
    ----------
    function: str
        The function, or ``''`` for a module with a rule.
    module: str
        The module, or the one that calls the function.
    is_layer: bool
        Whether it may absorb relevance.
    received, passed: float
        The sums of relevance.
    received_l1, passed_l1: float
        The sums of absolute relevance.
    '''

    function: str
    module: str
    is_layer: bool = False
    received: float = 0.0
    received_l1: float = 0.0
    passed: float = 0.0
    passed_l1: float = 0.0

    @property
    def conservation_error(self) -> float:
        '''The relevance created; negative where some was lost or absorbed.'''
        return self.passed - self.received

    def __str__(self) -> str:
        return _place(self.function, self.module)


@dataclass(frozen=True)
class Preflight:
    '''The relevance at every stage from the output to the input, and where it is unsound; print it for a table.

    Made by :meth:`zennit_prune.Pruner.preflight`.

    Parameters
    ----------
    stages: tuple of Stage
        The tensors that all relevance flows through, from the output to the input.
    problems: tuple of str
        Sentences that say where relevance is unsound; empty on a sound network.
    accounts: tuple of Account
        The relevance that each function, and each module with a rule, received and passed on, from the output to the
        input.

    References
    ----------
    Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation",
    PLOS ONE 10 (2015), equation 2: the relevance of every layer sums to the output.

    Examples
    --------
    The bias of the first layer adds a fifth of its output, and absorbs as much relevance:

    >>> import torch
    >>> from zennit.composites import EpsilonPlus
    >>> import zennit_prune as zp
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2, bias=False))
    >>> for parameter in model.parameters():
    ...     _ = torch.nn.init.constant_(parameter, 0.25)
    >>> x = torch.ones(2, 4)
    >>> found = zp.Pruner(model, EpsilonPlus(), x, progress=False).preflight(x)
    >>> found.sound
    True
    >>> [(stage.name, round(stage.sum, 3), round(stage.absorbed, 3)) for stage in found.stages]
    [('output', 1.0, 0.0), ('1', 1.0, 0.0), ('input', 0.8, 0.2)]
    '''

    stages: tuple[Stage, ...]
    problems: tuple[str, ...]
    accounts: tuple[Account, ...]

    @property
    def sound(self) -> bool:
        '''Whether relevance can be trusted.'''
        return not self.problems

    def __str__(self) -> str:
        rows = [(name, *(f'{value:.3g}' for value in values), f'{round(error, 4) + 0.0:.3g}')
                for name, *values, error in self.stages]
        return '\n'.join([table(('stage', 'sum', 'L1 norm', 'absorbed by layers', 'conservation error'), rows),
                          *(self.problems or ['Relevance is sound.'])])


def preflight(model: nn.Module, composite: Composite, recording: Recording, x: Any,
              origin: Origin | None = None) -> Preflight:
    '''Follow the relevance of a few samples through a network.

    Parameters
    ----------
    model: torch.nn.Module
        The network; it is left as it is.
    composite: zennit.core.Composite
        The rules.
    recording: Recording
        The trace of the network.
    x: torch.Tensor, tuple, dict or Batch
        A few inputs.
    origin: Origin, optional
        Where relevance starts; at the predicted class by default.

    Returns
    -------
    Preflight
        Stages, problems and accounts.

    Raises
    ------
    PruneError
        If relevance ceases to be finite, with the operation where it does; if inputs or target do not fit.
    '''
    run = recording.runs['eval']
    canonizer = GraphCanonizer.from_recording(recording)
    with attributing(model, composite, canonizer, lambda network: Bookkeeper(
            network, run.functions, canonizer.functions, lambda: why_not_finite(model, x))) as attribution:
        book, started = _book(attribution.network, attribution.reader, x, origin or Origin('predicted', inputs=x))
    positions = {key: position for position, key in enumerate(book)}
    stages = [Stage('output', *started, 0.0, 0.0)]
    for name, keys in _bottlenecks(run):
        key = next((key for key in keys if key in book), None)
        if key is not None:
            behind = [account for other, account in book.items() if positions[other] > positions[key]]
            absorbed, error = (sum(account.conservation_error for account in behind if account.is_layer == layer)
                               for layer in (True, False))
            stages.append(Stage(name, book[key].received, book[key].received_l1, -absorbed, error))
    furthest = max(number for number, stage in enumerate(stages) if stage.l1_norm)
    stages = [stage for number, stage in enumerate(stages) if stage.l1_norm or number > furthest]  # on the way to it
    accounts = tuple(account for key, account in reversed(book.items()) if key != 'input')
    return Preflight(tuple(stages), tuple(_problems(stages, accounts)), accounts)


def _may_absorb(call: FunctionCall, equivalent: Equivalent | None, tensors: Sequence[torch.Tensor]) -> bool:
    '''Return whether a call may absorb relevance: as a layer does, or by constants (class tokens, pads).'''
    if equivalent is not None:
        return equivalent.absorbs
    names = {operation.name for operation in call.operations if any(operation.active)}
    return names == {'constant_pad_nd'} or (names <= CHOOSING and not all(tensor.requires_grad for tensor in tensors))


def _book(network: nn.Module, bookkeeper: Bookkeeper, x: Any, origin: Origin
          ) -> tuple[dict[Any, Account], tuple[float, float]]:
    '''Return the accounts of one pass by call, in the order of the forward pass, the input first.

    Beside them, the sum and the L1 norm of the initial relevance.
    '''
    inputs = differentiable(x, network)
    leaves = [tensor for tensor in tensors_in(inputs) if tensor.requires_grad]
    if leaves:  # else tokens
        bookkeeper.open('input', Account('', 'input'), leaves)
    with torch.enable_grad():
        output = origin.chosen(call_network(network, inputs))
        check_depends(output)
        if not without_nan(output).all():
            raise PruneError(f'the output is not finite: {bookkeeper.why_not_finite() or "check the network"}.')
        bookkeeper.meet([output], '')
        start = origin.relevance(output)
        propagate(output, start, _leaves(output))
    return bookkeeper.close(start)


def _leaves(output: torch.Tensor) -> list[GradientEdge]:
    '''Return the ends of the gradient graph of an output: inputs, and parameters of layers that read constants.'''
    return [GradientEdge(node, 0) for node in graph_of(output) if hasattr(node, 'variable')]


class Bookkeeper(CallCounter):
    '''While a network runs, hook what enters and leaves its functions and the modules that have rules.'''

    def __init__(self, network: nn.Module, calls: Sequence[FunctionCall], equivalents: Mapping[Site, Equivalent],
                 why_not_finite: Callable[[], str]):
        super().__init__(network)
        self._network, self._equivalents, self.why_not_finite = network, equivalents, why_not_finite
        self._met: set[Node] = set()
        self._roots: set[Any] = set()
        self._called = {call.site: call for call in calls}
        self._accounts: dict[Any, Account] = {}
        self._sums: defaultdict[tuple[Any, str], list[torch.Tensor]] = defaultdict(list)
        self.accompany(network)

    def attach(self) -> None:
        '''Do nothing: modules are found while the network runs.'''

    def __enter__(self) -> CallCounter:
        self._owners = {name: module for name, module in self._network.named_modules() if rules_of(module)}
        return super().__enter__()

    def open(self, key: Any, account: Account, outputs: Sequence[torch.Tensor]) -> None:
        '''Open the account of the call that returned some tensors, unless all of them are constants.'''
        if any(tensor.requires_grad for tensor in outputs):
            self._accounts[key] = account
            for tensor in outputs:
                self._watch(key, 'received', tensor)

    def meet(self, tensors: Any, module: str) -> None:
        '''Open the accounts of the ``torch.autograd.Function`` that some tensors in a module come from.'''
        for tensor in tensors_in(tensors):
            node = tensor.grad_fn
            if node is None or node in self._met or not custom_function(node):
                continue
            key = BACKWARD, len(self._met)
            self._met.add(node)
            self._accounts[key] = Account(f'{BACKWARD}{custom_function(node)}', module)
            signals = [number for number, (following, _) in enumerate(node.next_functions)
                       if not hasattr(following, 'variable')]  # not parameters, but where there is nothing else
            node.register_prehook(partial(self._count, key, 'received', ()))
            node.register_hook(lambda passed, _, key=key, signals=signals: self._count(key, 'passed', signals, passed))

    def _count(self, key: Any, side: str, signals: Sequence[int], grads: Sequence[torch.Tensor | None]) -> None:
        '''Add the relevance that a function received or passed on to its signals, all by default.'''
        for number in signals or range(len(grads)):
            self._add(key, side, grads[number])

    def _add(self, key: Any, side: str, grad: torch.Tensor | None) -> None:
        if grad is not None:  # of a function that passes something on
            self._sums[key, side].append(torch.stack([grad.real.sum(), grad.abs().sum()]).double().cpu())

    def _watch(self, key: Any, side: str, tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(partial(self._add, key, side))

    def _aliased(self, key: Any, tensors: Any, active: Sequence[int] | None = None, in_place: int | None = None) -> Any:
        '''Return a view of each tensor, through which the relevance of a single reader flows back.'''
        found = tensors_in(tensors)
        watched = [position for position in active or () if found[position].requires_grad] or range(len(found))
        numbers = iter(range(len(found)))

        def alias(tensor: torch.Tensor) -> torch.Tensor:
            position = next(numbers)
            tensor = tensor if position == in_place or not tensor.requires_grad else tensor.view_as(tensor)
            if position in watched:  # parameters are not, but those that token numbers choose from
                self._watch(key, 'passed', tensor)
            return tensor

        return map_tensors(alias, tensors)

    def intercept(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        key = self.site
        call = self._called.get(key)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        self.meet((args, kwargs), key.module)
        if call is None or any(frame.module in self._owners for frame in self._stack):
            return func(*args, **kwargs)
        absorbs = _may_absorb(call, self._equivalents.get(key), tensors_in((args, kwargs)))
        args, kwargs = self._aliased(key, (args, kwargs), call.active, call.in_place)
        result = func(*args, **kwargs)
        self.open(key, Account(key.function.strip('_'), key.module, absorbs), tensors_in(result))
        return result

    def _is_outermost_owner(self, frame: Frame) -> bool:
        return frame.module in self._owners and not any(
            other.module in self._owners for other in self._stack if other is not frame)

    def entered(self, frame: Frame, inputs: Any) -> Any:
        self.meet(inputs, self._stack[-2].module)
        if not self._is_outermost_owner(frame):
            return None
        key = frame.module, frame.call
        if not needs_gradient(inputs):
            self._roots.add(key)
        return self._aliased(key, inputs)

    def left(self, frame: Frame, output: Any) -> None:
        self.meet(output, frame.module)
        if self._is_outermost_owner(frame):
            key = frame.module, frame.call
            between = isinstance(self._owners[frame.module], (Activation, AvgPool, BatchNorm, MaxPool, Sum))
            self.open(key, Account('', frame.module, not between or key in self._roots), tensors_in(output))

    def close(self, start: torch.Tensor) -> tuple[dict[Any, Account], tuple[float, float]]:
        '''Return the accounts relative to the initial relevance, and its sum and L1 norm.'''
        total, norm = float(start.double().sum()), float(start.double().abs().sum())
        if not isfinite(norm):
            raise PruneError('the initial relevance is not finite: '
                             f'{self.why_not_finite() or "check where it starts"}.')
        if not norm:
            raise PruneError(f'the initial relevance has an L1 norm of {norm:.3g}: start from an output that the '
                             'network decides, e.g. the predicted class.')
        cancels = abs(total) < 1e-3 * norm  # contrastive, say: there is no sum to speak of
        scale = torch.tensor([norm if cancels else total, norm], dtype=torch.float64, device='cpu')
        for (key, side), sums in self._sums.items():
            amounts = (torch.stack(sums).sum(0) / scale).tolist() if sums else (0.0, 0.0)
            for name, amount in zip((side, f'{side}_l1'), amounts):
                setattr(self._accounts[key], name, amount)
        for account in reversed(self._accounts.values()):
            if not account.passed_l1 < torch.inf:
                why = self.why_not_finite() or ('a rule there divides by zero or overflows. Use a rule with a larger '
                                                 'epsilon, or attribute in float32 or float64')
                raise PruneError(f'relevance is not finite any more behind {account}: {why}.')
        self._met.clear()  # nodes and hooks hold each other
        if self._roots:  # what is behind them was detached, or may be
            self._accounts = {key: account for key, account in self._accounts.items() if self._sums[key, 'received']}
        return self._accounts, (total / float(scale[0]), 1.0)


def _place(function: str, module: str) -> str:
    return f'{function} in {module!r}' if function and module else function or repr(module)


def _bottlenecks(run: Run) -> Iterator[tuple[str, list[Any]]]:
    '''Yield the values that all relevance flows through, from output to input, with the keys of their accounts.

    Of values that follow each other with only norms and activations between them, the last is used.
    '''
    makers: defaultdict[int, list[Any]] = defaultdict(list)
    names: dict[int, str] = {}
    for call in run.functions:
        for value in call.results[:1]:
            makers[value].append(call.site)
            names.setdefault(value, _place(call.site.function.strip('_'), call.site.module))
    for value, places in run.places.items():
        modules = [(place.module, place.call) for place in places if place.side == 'output' and place.module]
        makers[value] += modules
        if modules:
            names[value] = min((module for module, _ in modules), key=len)
    operations = [operation for operation in run.operations if any(operation.active)]
    last = {value: index for index, operation in enumerate(operations)
            for value, active in zip(operation.reads, operation.active or [True] * len(operation.reads)) if active}
    live = set(last).difference(value for operation in operations for value in operation.writes)  # the inputs
    found: list[tuple[bool, str, list[Any]]] = []
    for index, operation in enumerate(operations):
        live = {value for value in live if last[value] > index} | {
            value for value in operation.writes if last.get(value, -1) > index}
        if len(live) == 1 and operation.writes and operation.writes[0] in live:
            value = operation.writes[0]
            if value in names:
                found.append((operation.name in NEW_STAGE, names[value], makers[value]))
    for index in range(len(found) - 1, -1, -1):
        if index + 1 == len(found) or found[index + 1][0]:
            yield found[index][1:]
    yield 'input', ['input']  # without an account where there are token numbers, to which no relevance comes


def _problems(stages: Sequence[Stage], accounts: Sequence[Account]) -> Iterator[str]:
    worst = max(stages, key=lambda stage: abs(stage.conservation_error))
    error = worst.conservation_error
    if not abs(error) <= TOLERANCE * max(1, ROUNDING * max(stage.l1_norm for stage in stages)):
        culprits = [account for account in accounts if not account.is_layer
                    and abs(account.conservation_error) > 0.01 * abs(account.received) + 1e-3]
        yield (f'Relevance is unsound: {abs(error):.3g} times the initial one is {"created" if error > 0 else "lost"} '
               f'between the output and {worst.name!r}, by operations without a rule that conserves it: '
               f'{_listed(culprits)}.')
    largest = max(stages, key=lambda stage: stage.l1_norm)
    if largest.l1_norm > EXPLODED:
        culprits = [account for account in accounts if account.received_l1 > 0.1]
        culprits.sort(key=lambda account: account.received_l1 / max(account.passed_l1, 1e-9))
        yield (f'The absolute relevance at {largest.name!r} is {largest.l1_norm:.3g} times the initial one: large '
               f'positive and negative shares cancel. It grows most in {_listed(culprits[:3])}.')
    smallest = min(stages, key=lambda stage: stage.l1_norm)
    if smallest.l1_norm < FADED:
        culprits = [account for account in accounts if abs(account.passed) < 0.99 * abs(account.received)]
        culprits.sort(key=lambda account: abs(account.passed) / max(abs(account.received), 1e-9))
        own = 'by functions with a backward of their own, ' if any(
            account.function.startswith(BACKWARD) for account in culprits[:3]) else ''
        yield (f'Relevance fades: {smallest.l1_norm:.2g} of the initial one arrives at {smallest.name!r}, so that '
               f'channels in front are ranked below those behind. Most is absorbed by biases, {own}or where z-plus '
               f'finds nothing positive to give to, in {_listed(culprits[:3])}. Consider the epsilon rule.')


def _listed(accounts: Sequence[Account]) -> str:
    '''List the first few accounts, from the output, with the relevance they received and passed on.'''
    shown = [f'{account} ({account.received:.3g} becomes {account.passed:.3g})' for account in accounts[:3]]
    more = [f'{len(accounts) - 3} more'] if len(accounts) > 3 else []
    return ', '.join([*shown, *more]) or 'no function or module that can be named'
