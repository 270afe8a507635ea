'''Attribution passes: a copy of the network under rules, readers of its tensors, and Zennit's Attributors.

All passes run on a copy of the network. Whatever a composite, a canonizer or an exception leaves behind, the user's
network, its training flags, gradients and hooks are never touched.
'''
from __future__ import annotations

import copy
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from zennit.attribution import Attributor, identity
from zennit.composites import COMPOSITES, LayerMapComposite, layer_map_base
from zennit.core import BasicHook, Composite, Hook, RemovableHandleList
from zennit.rules import Epsilon
from zennit.types import Linear

from ..errors import PruneError, shown
from ..tracing._boundaries import Place
from ..tracing._calls import CallCounter
from ..tracing._parametrized import plain
from ..util._arguments import call_network
from ..util._isolation import TYPES, exact_pass, misses_autocast
from ..util._loaders import Batch
from ..util._networks import copied, device_of, map_tensors, tensors_in
from ._canonize import GraphCanonizer, lends_its_rules, needs_gradient, rule_of, rules_of, unregister

OWN = ('zennit', 'torch.')  # where functions are defined that are part of rules, or of torch


def recommended_composite() -> Composite:
    '''Return the composite with epsilon on every layer, the rule that ranks channels best.'''
    return LayerMapComposite([*layer_map_base(), (Linear, Epsilon())])


class MakesComposite(Protocol):
    '''An object that makes its composite, as presets do.'''

    @property
    def composite(self) -> Callable[[], Composite]:
        '''A function without arguments that returns the composite.'''


Rules: TypeAlias = Composite | MakesComposite


def checked_composite(given: Rules | None) -> Composite:
    '''Return the composite that was given, that of a preset, or the recommended one for None.

    Raises
    ------
    PruneError
        For anything else, with a composite that may have been meant.
    '''
    if given is None:
        return recommended_composite()
    if isinstance(given, Composite):
        return given
    factory = None if isinstance(given, type) else getattr(given, 'composite', None)
    made = factory() if callable(factory) else None
    if isinstance(made, Composite):
        return made
    meant = COMPOSITES.get(given) if isinstance(given, str) else given
    name = meant.__name__ if isinstance(meant, type) and issubclass(meant, Composite) else 'EpsilonPlus'
    raise PruneError(f'a Zennit composite is needed, an instance, not {shown(given)}: e.g. {name}() from '
                     'zennit.composites, a preset as zp.presets.paper, or None.')


@contextmanager
def attributing(model: nn.Module, composite: Composite, canonizer: GraphCanonizer | None,
                reader: Callable[[nn.Module], Any] | None = None,
                fed: Collection[tuple[str, int]] | None = None) -> Iterator[Attribution]:
    '''Attach the rules of ``composite`` to a canonized copy of ``model`` in evaluation mode.

    The graph's canonizer is applied after the composite's own. A copy of the composite is registered, so that the
    composite itself may be in use elsewhere. The copy runs without checkpointing, autocast and inference mode. What it
    runs without gradients is a constant: no rule applies there. Relevance ends at the layers that read such constants;
    ``fed``, by default what the canonizer found, are the calls that depend on the network's inputs.
    '''
    _refuse_patched_rules()
    network = plain(copied(model)).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    _run_exactly(network)
    reading = reader(network) if reader else None
    registered = copy.copy(composite)
    registered.handles, registered.hook_refs = RemovableHandleList(), weakref.WeakSet()
    given = canonizer is None or any(isinstance(other, GraphCanonizer) for other in composite.canonizers)
    registered.canonizers = [*composite.canonizers, *([] if given else [canonizer])]
    try:
        registered.register(network)
        if canonizer is not None:
            _rules_per_call(network, registered, canonizer)
            fed = canonizer.fed if fed is None else fed
        _only_with_gradients(network)
        _passing_on_none(registered)
        _Roots(network, fed or ())
        if reading is not None:
            reading.attach()
        yield Attribution(network, reading, registered)
    finally:
        registered.remove()


def _refuse_patched_rules() -> None:
    '''Raise where another library (LXT, say) replaced methods of all of Zennit's rules.'''
    for name in ('forward', 'backward', 'pre_forward', 'post_forward', 'pre_backward'):
        home = getattr(BasicHook, name).__module__
        if home != BasicHook.__module__:
            raise PruneError(f'zennit.core.BasicHook.{name} was replaced by one of {home!r} (LXT does so when it '
                             'patches Zennit): gradients are then no relevance. Use a process without that patch.')


class Attribution(NamedTuple):
    '''A network under rules: the copy that runs, the reader of its tensors, and the composite registered with it.'''

    network: nn.Module
    reader: Any
    composite: Composite


def _run_exactly(network: nn.Module) -> None:
    '''Let a network run without checkpointing, autocast and inference mode from now on.'''
    forward = network.forward

    def exact_forward(*args: Any, **kwargs: Any) -> Any:
        with exact_pass():
            try:
                return forward(*args, **kwargs)
            except RuntimeError as error:
                if misses_autocast(error):
                    raise PruneError(f'the network does not run without autocast, which is switched off for relevance: '
                                     f'{error}. Convert the network and its inputs to one type, e.g. with '
                                     '.float().') from error
                raise

    network.forward = exact_forward


def _only_with_gradients(network: nn.Module) -> None:
    '''Let every rule pass over calls that run without gradients, whose outputs are constants.'''
    for module in network.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                rule = rule_of(hook)
                if rule is not None:
                    hooks[key] = _passing_over_constants(hook, rule)


def _passing_over_constants(hook: Callable[..., Any], rule: Hook) -> Callable[..., Any]:
    '''Return a hook of a module that does nothing where gradients are disabled or no positional input needs one.'''
    def in_graph(module: nn.Module, inputs: Any, *rest: Any) -> Any:
        return hook(module, inputs, *rest) if needs_gradient(inputs) or _has_keywords_only(inputs) else None

    in_graph.rule = rule  # type: ignore[attr-defined]  # as on a module, where hooks are bound methods
    return in_graph


def _passing_on_none(composite: Composite) -> None:
    '''Let rules pass on that no relevance arrives: functions of users may return None for an input.'''
    for rule in list(composite.hook_refs):
        rule.backward = partial(_unless_none, rule.backward)


def _unless_none(backward: Callable[..., Any], module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return None if grad_output[0] is None else backward(module, grad_input, grad_output)


def _has_keywords_only(inputs: Any) -> bool:
    '''Return whether the positional inputs of a call, which is all that rules may see, hold no tensor.'''
    return torch.is_grad_enabled() and not tensors_in(inputs)


class _Roots:
    '''Let relevance end at layers that read constants which depend on the network's inputs.

    Such constants come from parts without gradients or from whole numbers (tokens). While a layer reads them, its own
    parameters need gradients, so that its output is part of the gradient graph, and relevance arrives at it.

    Parameters
    ----------
    network: torch.nn.Module
        The copy that will be attributed.
    fed: collection of (str, int)
        The calls of modules that read what depends on the network's inputs.
    '''

    def __init__(self, network: nn.Module, fed: Collection[tuple[str, int]]):
        self._fed, self._calls = fed, Counter[str]()
        names = {name for name, _ in fed}
        network.register_forward_pre_hook(self._restart, prepend=True)
        for name, module in network.named_modules():
            if name in names and any(parameter is not None for parameter in module._parameters.values()):
                opened: list[list[nn.Parameter]] = []
                module.register_forward_pre_hook(partial(self._open, name, opened), with_kwargs=True)
                module.register_forward_hook(partial(self._close, opened), always_call=True)

    def _restart(self, network: nn.Module, inputs: Any) -> None:
        self._calls.clear()

    def _open(self, name: str, opened: list[list[nn.Parameter]], module: nn.Module, args: Any, kwargs: Any) -> None:
        call = name, self._calls[name]
        self._calls[name] += 1
        constant = torch.is_grad_enabled() and not needs_gradient((args, kwargs))
        frozen = [parameter for parameter in module._parameters.values()
                  if parameter is not None and parameter.is_floating_point() and not parameter.requires_grad]
        opened.append(frozen if constant and call in self._fed else [])
        for parameter in opened[-1]:
            parameter.requires_grad_(True)

    def _close(self, opened: list[list[nn.Parameter]], module: nn.Module, args: Any, output: Any) -> None:
        for parameter in opened.pop() if opened else ():
            parameter.requires_grad_(False)


def _rules_per_call(network: nn.Module, composite: Composite, canonizer: GraphCanonizer) -> None:
    '''Give every call of a reused module a rule of its own: those of Zennit keep the last call's tensors only.'''
    for name, module in network.named_modules():
        rules = [rule for rule in rules_of(module) if isinstance(rule, BasicHook)]
        if canonizer.calls.get(name, 1) < 2 or not rules or lends_its_rules(module):
            continue
        unregister(module, rules)
        calls = _CallsOf(network, module)
        for rule in rules:
            for call in range(canonizer.calls[name]):
                copied_rule = rule.copy()
                composite.hook_refs.add(copied_rule)
                composite.handles.append(copied_rule.register(calls.only(call, copied_rule)))
                calls.rules.append(copied_rule)


class _CallsOf:
    '''Stands in for a module while rules are registered, so that each sees one of its calls only.'''

    def __init__(self, network: nn.Module, module: nn.Module):
        self.module, self.running = module, -1
        self.rules: list[BasicHook] = []  # a hook lives as long as someone holds it
        module.register_forward_pre_hook(self._begin, prepend=True)
        network.register_forward_pre_hook(self._restart, prepend=True)

    def _restart(self, network: nn.Module, inputs: Any) -> None:
        self.running = -1

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self.running += 1

    def only(self, call: int, rule: BasicHook) -> Any:
        '''Return an object with the ``register_*`` methods that a rule needs, for one call of the module.'''
        def registering(method: Callable[..., Any]) -> Callable[..., Any]:
            def register(hook: Callable[..., Any], **options: Any) -> Any:
                def in_this_call(*args: Any) -> Any:
                    return hook(*args) if self.running == call else None

                in_this_call.rule = rule  # type: ignore[attr-defined]  # as on a module, where hooks are bound methods
                return method(in_this_call, **options)
            return register

        return SimpleNamespace(register_forward_hook=registering(self.module.register_forward_hook),
                               register_forward_pre_hook=registering(self.module.register_forward_pre_hook))


class Reader(CallCounter):
    '''Catch the gradient edges of tensors at given places while a network runs.

    An edge is caught where the tensor appears, so that later in-place operations do not matter.

    Parameters
    ----------
    network: torch.nn.Module
        The copy that will be attributed, before a composite is registered.
    places: sequence of Place
        Where to catch tensors.
    '''

    def __init__(self, network: nn.Module, places: Sequence[Place]):
        super().__init__(network)
        self.network = network
        self.caught: dict[Place, GradientEdge] = {}
        self._counts: list[dict[str, int]] = []
        self._wanted = {place for place in places if place.side == 'function'}
        self._sites = {place.site for place in self._wanted}
        self.met = False  # any of the tensors
        self._at_modules: defaultdict[str, list[Place]] = defaultdict(list)
        for place in places:
            if place.side != 'function':
                self._at_modules[place.module].append(place)
        if self._wanted:  # entered inside the canonizers' own modes, so that it sees the calls first
            self.accompany(network)

    def attach(self) -> None:
        '''Hook the modules, after the composite did, so that what its rules return is caught.'''
        for name, module in self.network.named_modules():
            places = self._at_modules.get(name, ())
            if places:
                calls = {'input': 0, 'output': 0}
                self._counts.append(calls)
                if any(place.side == 'input' for place in places):
                    module.register_forward_pre_hook(self._hook('input', places, calls), prepend=True)
                if any(place.side == 'output' for place in places):
                    module.register_forward_hook(self._hook('output', places, calls))

    def _hook(self, side: str, places: Sequence[Place], calls: dict[str, int]) -> Callable[..., None]:
        def catch(module: nn.Module, inputs: Any, output: Any = None) -> None:
            for place in places:
                if place.side == side and place.call == calls[side]:
                    self._catch(place, inputs if side == 'input' else output)
            calls[side] += 1
        return catch

    def _catch(self, place: Place, value: Any) -> None:
        tensors, self.met = tensors_in(value), True
        if place.position < len(tensors) and tensors[place.position].requires_grad:
            self.caught[place] = get_gradient_edge(tensors[place.position])

    def intercept(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        site = self.site
        result = func(*args, **kwargs)
        if site in self._sites:
            for place in self._wanted:
                if place.site == site:
                    self._catch(place, result)
        return result

    def clear(self) -> None:
        '''Forget the tensors caught, before the next pass.'''
        self.caught.clear()
        for calls in self._counts:
            calls.update(input=0, output=0)


class Keeper(Reader):
    '''A reader that keeps the values of the last pass as well, in float32 or better.'''

    def __init__(self, network: nn.Module, places: Sequence[Place]):
        super().__init__(network, places)
        self.values: dict[Place, torch.Tensor] = {}
        network.register_forward_pre_hook(lambda *_: self.values.clear())

    def _catch(self, place: Place, value: Any) -> None:
        super()._catch(place, value)
        tensors = tensors_in(value)
        if place.position < len(tensors):  # a copy, for the network may go on to write into it
            value = tensors[place.position].detach()
            self.values[place] = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)


def differentiable(inputs: Any, network: nn.Module) -> Any:
    '''Copy inputs to the network's device, such that gradients can be traced back from the output to every layer.

    Parameters
    ----------
    inputs: torch.Tensor, tuple, dict, list or Batch
        Inputs; a batch whose values were checked is not checked again.
    network: torch.nn.Module
        The copy that will be attributed.

    Returns
    -------
    torch.Tensor, tuple, dict or list
        Floating-point tensors require gradients. Where there are whole numbers (of tokens, say), the parameters of
        ``network`` do, too: relevance is then traced back to the embeddings.

    Raises
    ------
    PruneError
        If an input holds values that are not finite.
    '''
    batch, device = Batch.of(inputs if isinstance(inputs, Batch) else (inputs, None), network), device_of(network)
    batch.check_finite()
    inputs = map_tensors(lambda tensor: tensor.detach().to(device, copy=True), batch.inputs)
    found = tensors_in(inputs)
    tensors = [tensor for tensor in found if tensor.is_floating_point()]
    for tensor in tensors:
        tensor.requires_grad_(True)
    if not tensors or any(not tensor.is_floating_point() and tensor.dtype != torch.bool for tensor in found):
        for parameter in network.parameters():
            parameter.requires_grad_(True)
    return inputs


def propagate(output: torch.Tensor, start: torch.Tensor, inputs: Sequence[Any],
              again: bool = False) -> Sequence[torch.Tensor | None]:
    '''Return the relevance at ``inputs`` (tensors or gradient edges) for ``start`` on ``output``.

    An input that no relevance arrives at gets None. With ``again``, the graph is kept for another start.

    Raises
    ------
    PruneError
        If the output has no gradient history, or a rule of the composite fails.
    '''
    check_depends(output)
    try:
        with exact_pass():
            return torch.autograd.grad([output], inputs, [start], retain_graph=again, allow_unused=True)
    except PruneError:
        raise
    except Exception as error:  # of a rule, or the backward of a function of the user's
        raise PruneError(f'the composite cannot propagate relevance through this network: {error or repr(error)}. '
                         f'{_remedy(error, output)}') from error


def _remedy(error: Exception, output: torch.Tensor) -> str:
    '''Return what to do where relevance cannot be propagated from an output.'''
    if TYPES.search(str(error)):
        return ('The network converts values to another type by hand (.half(), .to(torch.bfloat16)), which a rule '
                'cannot follow: remove the conversion, or convert the network and its inputs to one type, e.g. with '
                '.float().')
    own = ', '.join(dict.fromkeys(filter(None, map(custom_function, graph_of(output)))))
    backward = f'The backward of {own} does not run, perhaps because parameters are frozen; or a' if own else 'A'
    return (f'{backward} rule sits on a module that it does not fit, e.g. one with several inputs: map it to no rule, '
            'or to one that fits.')


def graph_of(output: torch.Tensor) -> list[Node]:
    '''Return the nodes of the gradient graph of an output.'''
    front, found = [output.grad_fn], dict[Node, None]()
    while front:
        node = front.pop()
        if node is not None and node not in found:
            found[node] = None
            front += [following for following, _ in node.next_functions]
    return list(found)


def custom_function(node: Node | None) -> str:
    '''Return the name of the user's ``torch.autograd.Function`` that a node of a graph belongs to, or an empty text.'''
    kind = getattr(type(node), '_forward_cls', None) if isinstance(node, BackwardCFunction) else None
    return '' if kind is None or kind.__module__.startswith(OWN) else kind.__name__


def check_depends(output: torch.Tensor) -> None:
    '''Refuse an output that no gradient, and so no relevance, can be traced back from.

    Raises
    ------
    PruneError
        With the usual reasons.
    '''
    if not output.requires_grad:
        raise PruneError('no relevance can be traced back from the output, as it was computed without gradients: '
                         'forward, or the code around this call, runs under torch.no_grad() or '
                         'torch.inference_mode(), or forward returns detached values '
                         '(.detach(), .data) or whole numbers made float (argmax, comparisons). Return the values from '
                         'before, or let that part run with gradients; or name another output with output=.')


AttributorFactory = Callable[[nn.Module], Attributor]


class Passes(nn.Module):
    '''A network as an Attributor sees it; adds up the relevance that arrives at each place.

    Parameters
    ----------
    network: torch.nn.Module
        The network under rules.
    reader: Reader
        Catches its tensors.
    forget: callable
        Removes the tensors and handles that the last pass left behind.
    choose: callable
        From what the network returns to the output that relevance starts from.
    '''

    def __init__(self, network: nn.Module, reader: Reader, forget: Callable[[], None],
                 choose: Callable[[Any], torch.Tensor]):
        super().__init__()
        self.network, self.reader, self.forget, self.choose = network, reader, forget, choose
        self.sums: dict[Place, torch.Tensor] = {}
        self.passes = 0

    def forward(self, inputs: Any) -> torch.Tensor:
        '''Run the network and wait for relevance to come back.'''
        self.forget()
        output = self.choose(call_network(self.network, inputs))
        if torch.is_grad_enabled():
            check_depends(output)
        for place, edge in self.reader.caught.items():
            edge.node.register_prehook(partial(self._add, place, edge.output_nr))
        if output.requires_grad:
            output.register_hook(self._count)
        return output

    def _add(self, place: Place, position: int, gradients: tuple[torch.Tensor | None, ...]) -> None:
        relevance = gradients[position]
        if relevance is not None:
            relevance = relevance.detach()
            self.sums[place] = self.sums[place] + relevance if place in self.sums else relevance

    def _count(self, gradient: torch.Tensor) -> None:
        self.passes += 1

    def mean(self) -> dict[Place, torch.Tensor]:
        '''Return the mean relevance over the passes, for each place where any arrived.'''
        return {place: values / self.passes for place, values in self.sums.items()}


def attributed(factory: AttributorFactory, passes: Passes, inputs: Any,
               start: Callable[[torch.Tensor], torch.Tensor], seed: int) -> dict[Place, torch.Tensor]:
    '''Return the mean relevance at every place over the passes of an Attributor, whose noise depends on ``seed`` only.

    Raises
    ------
    PruneError
        If ``factory`` makes no Attributor, one with a start or rules of its own, or one that fails.
    '''
    if not isinstance(inputs, torch.Tensor):
        raise PruneError(f'an Attributor takes a single tensor, but the inputs are a {type(inputs).__name__}.')
    attributor = factory(passes)
    if not isinstance(attributor, Attributor):
        raise PruneError(f'attributor= made a {type(attributor).__name__}: give a Zennit Attributor class, or a '
                         'function from a model to an Attributor.')
    if attributor.composite is not None or attributor.attr_output_fn is not identity:
        raise PruneError('make the Attributor without composite and attr_output: the network it is given is under the '
                         'rules already, and relevance starts as initial= says.')
    try:
        with fixed_randomness(seed, inputs.device), exact_pass():
            attributor(inputs.detach(), start)
    except PruneError:
        raise
    except Exception as error:
        raise PruneError(f'{type(attributor).__name__} does not run on this network: {type(error).__name__}: '
                         f'{error}') from error
    return passes.mean()


@contextmanager
def fixed_randomness(seed: int, device: torch.device) -> Iterator[None]:
    '''Draw random numbers from ``seed``; the global random state is restored afterwards.'''
    accelerated = device.type != 'cpu'
    with torch.random.fork_rng([device] if accelerated else [], device_type=device.type if accelerated else 'cuda'):
        torch.default_generator.manual_seed(seed)
        if accelerated:
            accelerator = getattr(torch, device.type)
            with accelerator.device(device):
                accelerator.manual_seed(seed)
        yield
