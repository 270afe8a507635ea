'''Run a network once on meta tensors and record how every ATen operation moves channel labels.

Meta tensors have shapes and no data, so that a trace costs a fraction of a second whatever the size of the network. A
network that needs values (constants made on the CPU, data-dependent shapes) is run on copies of its real tensors
instead; one whose Python branches on values of its input is refused, for only one of its paths would be seen. The
example that a network is traced with is checked here and turned into the arguments of a run.
'''
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..errors import PruneError, shown, warn
from ..util._arguments import advice, arguments_for, spread
from ..util._isolation import isolated, states
from ..util._networks import (
    map_tensors,
    modules_by_name,
    output_tensors,
    set_mode,
    structural_copy,
    tensors_by_module,
    tensors_in,
    unique_tensors,
)
from ..util._samples import batch_size, sample_list
from ._attributes import Claim, mark_attributes, norm_claims
from ._boundaries import Boundaries, Guard, Outputs, Place
from ._calls import Site
from ._labels import BlockField, Field, Labels, in_rows
from ._parametrized import weights_of
from ._recorded import FunctionCall, Operation, distinct
from ._shapes import Shapes
from ._tracer import TORCHSCRIPT, ForwardError, OriginalUsed, Outcome, Tracer

TRACED_BATCH = 2


@dataclass
class Example:
    '''The arguments that a network is traced with, and the settings of the trace.

    Attributes
    ----------
    args: tuple
        The positional arguments, as the user gave them.
    kwargs: dict
        The keyword arguments.
    given_batch: int
        The number of samples in the arguments.
    dtype: torch.dtype or None
        The type of the network's parameters.
    device: str
        ``'meta'`` for a run without data, ``'real'`` for one with values.
    resize: bool
        Whether the network is run on ``TRACED_BATCH`` samples, however many were given: a batch of one would hide
        mix-ups of batch and channels.
    layernorm: str
        Whether channels that LayerNorm runs over are locked, as in :func:`zennit_prune.trace`.
    whole: frozenset of Site
        The products of stacks of matrices that lose whole matrices instead of rows and columns.
    '''

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given_batch: int
    dtype: torch.dtype | None
    device: str = 'meta'
    resize: bool = True
    layernorm: str = 'lock'
    whole: frozenset[Site] = frozenset()

    def fitted(self, model: nn.Module) -> Example:
        '''Fit the example to a network that was moved or converted since, e.g. by ``model.half()``.'''
        like = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), None)
        if like is None:
            return self

        def fit(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(like.device, like.dtype if tensor.dtype == self.dtype else tensor.dtype)

        return replace(self, args=map_tensors(fit, self.args), kwargs=map_tensors(fit, self.kwargs))

    @property
    def batch(self) -> int:
        '''The number of samples that the network is traced with.'''
        return TRACED_BATCH if self.resize else self.given_batch

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        samples = sample_list(self.args)
        if samples is None:
            return map_tensors(self._resized, self.args), map_tensors(self._resized, self.kwargs)
        if self.resize:
            samples = [samples[number % len(samples)] for number in range(TRACED_BATCH)]
        return (map_tensors(self._prepared, samples),), {}

    def _resized(self, tensor: torch.Tensor) -> torch.Tensor:
        '''Prepare a tensor that holds all samples.'''
        if self.resize and tensor.dim() > 0 and tensor.shape[0] == self.given_batch:
            if self.device == 'meta':
                return torch.empty((TRACED_BATCH, *tensor.shape[1:]), dtype=tensor.dtype, device='meta')
            tensor = tensor[torch.arange(TRACED_BATCH, device=tensor.device) % self.given_batch]
        return self._prepared(tensor)

    def _prepared(self, tensor: torch.Tensor) -> torch.Tensor:
        '''Return a copy, without data on ``'meta'``.'''
        if self.device == 'meta':
            return torch.empty(tensor.shape, dtype=tensor.dtype, device='meta')
        return tensor.detach().clone()


def _holds_packed(value: Any) -> bool:
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return True
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return any(map(_holds_packed, parts))


def prepare_example(model: nn.Module, example: Any) -> Example:
    '''Check an example, and return the arguments that it stands for.

    Parameters
    ----------
    model: torch.nn.Module
        The network.
    example: torch.Tensor, tuple, mapping, list or Example
        An input, a tuple of arguments, keyword arguments or a list of samples, see
        :func:`zennit_prune.util._arguments.arguments_for`.

    Returns
    -------
    Example
        The arguments.

    Raises
    ------
    PruneError
        If the example holds no tensor, no sample or a packed sequence, or is on another device than the network.
    '''
    if isinstance(example, Example):
        return replace(example)
    if _holds_packed(example):
        raise PruneError('the example holds a PackedSequence, whose sizes are values, so no other network could be '
                         'held against it: prune a module that takes padded tensors.')
    arguments = arguments_for(model, example)
    args, kwargs = spread(arguments)
    tensors = tensors_in((args, kwargs))
    if not tensors:
        kinds = ', '.join(dict.fromkeys(type(value).__name__ for value in (*args, *kwargs.values())))
        raise PruneError(f'the example holds no tensor that was found, only {kinds or "nothing"}: tensors are looked '
                         'for in tuples, lists and dicts. Give a tensor, a tuple of arguments or a dict of keyword '
                         'arguments, as the network is called with; where it takes other objects, wrap it in a module '
                         'that makes them of tensors.')
    if any(tensor.dim() and not tensor.shape[0] for tensor in tensors):
        raise PruneError('the example holds no sample: its batch has size 0.')
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    for tensor in tensors:
        if devices and tensor.device not in devices and tensor.device.type != 'meta':
            raise PruneError(f'the example is on {tensor.device} and the network on '
                             f'{", ".join(sorted(map(str, devices)))}: move one of them, e.g. '
                             'example.to(next(model.parameters()).device).')
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
    return Example(args, kwargs, batch_size(arguments), dtype)


SUBCLASS_FAILURE = 'raw Tensor object is already associated'  # up to torch 2.4, of as_subclass in any dispatch mode


class Axis(NamedTuple):
    '''One dimension of a parameter or buffer, whose indices bear the labels ``start`` to ``start + size - 1``.

    With several ``blocks``, the labels stand for the indices of the dimension in the first block of dimension 0, then
    for those in the second, and so on: the input channels of a grouped convolution, the outputs of a transposed one.
    '''

    parameter: str
    dim: int
    size: int
    start: int
    blocks: int = 1

    @property
    def length(self) -> int:
        '''The size of the dimension, which is smaller than ``size`` where there are several blocks.'''
        return self.size // self.blocks

    @property
    def labels(self) -> Labels:
        '''The labels of the dimension's indices.'''
        return Labels(np.arange(self.start, self.start + self.size))


class TensorSize(NamedTuple):
    '''The shape of a tensor, the bytes of each element, and whether it is a parameter rather than a buffer.'''

    shape: tuple[int, ...]
    bytes_each: int
    is_parameter: bool


@dataclass
class Run:
    '''The record of one pass through a network.

    Attributes
    ----------
    example: Example
        The arguments of the pass.
    training: bool
        Whether it ran in training mode.
    operations: list of Operation
        The recorded operations, in the order in which they ran.
    group_sizes: dict of str to int
        Weights whose module has one group for so many of their channels, see :meth:`Tracer.keep_group_size`.
    places: dict of int to list of Place
        Where each value enters and leaves modules and torch functions; empty but for the first example in evaluation
        mode.
    outputs: dict of (str, int) to list of list of Field
        The fields of every tensor that a call of a module returned, by the module's name and the number of the call.
    functions: list of FunctionCall
        The calls of torch functions with activations; empty but for the first example in evaluation mode.
    claims: list of Claim
        The attributes of modules that state sizes.
    draws: bool
        Whether ``forward`` drew random numbers.
    '''

    example: Example
    training: bool
    operations: list[Operation]
    group_sizes: dict[str, int]
    places: dict[int, list[Place]]
    outputs: dict[tuple[str, int], list[list[Field]]]
    functions: list[FunctionCall]
    claims: list[Claim]
    draws: bool = False

    def is_like(self, other: Run) -> bool:
        '''Return whether two passes did the same to labels.'''
        return (self._signature() == other._signature()
                and len(distinct([*other.operations, *self.operations])) == len(distinct(other.operations)))

    def _signature(self) -> list[Any]:
        seen: dict[int, int] = {}
        return [(operation.name, operation.shapes[:1], operation.scalars, len(operation.ties), len(operation.locks),
                 [seen.setdefault(value, len(seen)) for value in (*operation.reads, *operation.writes)])
                for operation in self.operations]


def run_network(network: nn.Module, example: Example, training: bool, tracer_type: Callable[..., Tracer],
                fields: Mapping[str, list[Field]], shapes: Shapes | None = None, guard: type[Guard] = Guard,
                outcomes: dict[Any, Outcome] | None = None, originals: Mapping[int, str] | None = None) -> Run:
    '''Run a structural copy once under a tracer.

    Parameters
    ----------
    network: torch.nn.Module
        The structural copy, which is used up.
    example: Example
        Its arguments.
    training: bool
        Whether it is run in training mode.
    tracer_type: callable
        A class of tracer, or a function that makes one.
    fields: mapping of str to list of Field
        The labels of parameters and buffers by name.
    shapes: Shapes, optional
        The results of operations on meta tensors that other runs worked out.
    guard: type
        The class that watches the calls of modules and torch functions.
    outcomes: dict, optional
        The effects of operations on labels in other passes through the network; those of this run are added.
    originals: mapping of int to str, optional
        The names of tensors of the network that this is a copy of, by ``id``; they may not be used.

    Returns
    -------
    Run
        The record of the pass.
    '''
    found = tensors_by_module(network)
    counter = guard(network)
    tracer = counter.tracer = tracer_type(counter, {id(tensor): name for name, tensor in reversed(found)})
    if shapes is not None:
        tracer.shapes = shapes
    tracer.outcomes, tracer.originals = outcomes, originals or {}
    for name, tensor in found:
        if name in fields:
            tracer.place(tensor, fields[name])
    set_mode(network, training)
    for _, tensor in found:
        tensor.requires_grad_(False)  # matmul takes another path where gradients are wanted
    args, kwargs = example.arguments()
    tracer.activate(tensors_in((args, kwargs)))
    tracer.layernorm, tracer.whole = example.layernorm, example.whole
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), warnings.catch_warnings(), isolated(network):
            warnings.simplefilter('ignore')
            watched = training and originals is not None  # replays draw what the trace drew
            before = states() if watched else ()
            with counter, tracer:
                output = network(*args, **kwargs)
            draws = watched and states() != before
        tracer.finish(output_tensors(output))
    except PruneError:
        raise
    except Exception as error:
        if SUBCLASS_FAILURE in str(error):
            where = f'module {counter.failed!r}' if counter.failed else 'the network itself'
            raise PruneError(
                f'the network cannot be traced by torch {torch.__version__}: in {where}, '
                'Tensor.as_subclass makes a subclass of a tensor, which this release cannot do while operations are '
                'recorded. Newer ones can: update torch, or trace the network without as_subclass.') from error
        raise ForwardError(counter.failed, len(tracer.operations), error) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        del counter.tracer  # they refer to each other: all tensors would stay until the next search for garbage
    return Run(example, training, tracer.operations, tracer.group_sizes, counter.places, counter.outputs,
               counter.functions, counter.claims, draws)


@dataclass
class Recording:
    '''The trace of a network.

    Attributes
    ----------
    example: Example
        The arguments that it was run with; of several examples, the first one, which costs and relevance are of.
    axes: list of Axis
        Every labelled dimension, in the order of the labels.
    fields: dict of str to list of Field
        The label fields of each floating-point parameter and buffer.
    sizes: dict of str to TensorSize
        The size of each parameter and buffer, once.
    runs: dict of str to Run
        The record of each pass: ``'eval'``, and ``'train'`` where that differs; ``'eval 2'`` and ``'train 2'`` for a
        second example, and so on.
    notes: list of str
        Remarks about the trace that the user should know.
    shapes: Shapes
        The results of operations on meta tensors, for further runs.
    untraced: str
        Why the network could not be run in training mode, or an empty string.
    '''

    example: Example
    axes: list[Axis]
    fields: dict[str, list[Field]]
    sizes: dict[str, TensorSize]
    runs: dict[str, Run]
    notes: list[str]
    shapes: Shapes
    untraced: str = ''

    @property
    def examples(self) -> list[Example]:
        '''All examples, the first one first.'''
        return list({id(run.example): run.example for run in self.runs.values()}.values())

    @property
    def further_parts(self) -> list[str]:
        '''The modules that only further examples run, without those inside another such module.'''
        first = {module for module, _ in self.runs['eval'].outputs}
        others = {module: None for run in self.runs.values() for module, _ in run.outputs if module not in first}
        return [module for module in others
                if not any(module.startswith(f'{other}.') for other in others if other != module)]

    @property
    def device(self) -> str:
        '''``'meta'`` where all passes run without data, ``'real'`` where any needs values.'''
        return 'real' if any(example.device == 'real' for example in self.examples) else 'meta'

    @property
    def size(self) -> int:
        '''The number of labels, label 0 included.'''
        return self.axes[-1].start + self.axes[-1].size if self.axes else 1

    def warn_if_untraced(self) -> None:
        '''Warn that the network is proven for evaluation only.'''
        if self.untraced:
            warn(f'the network was not traced in training mode ({self.untraced}): that the pruned one can be '
                 'trained is not proven. Run it once in training mode before you rely on it.')

    @cached_property
    def operations(self) -> list[Operation]:
        '''The operations of all passes, without repetitions of earlier ones; trials add to them.'''
        return distinct(operation for run in self.runs.values() for operation in run.operations)


def record(model: nn.Module, example: Any, layernorm: str = 'lock', whole: Iterable[Site] = (),
           examples: Sequence[Any] = ()) -> Recording:
    '''Trace a network in evaluation and in training mode.

    Parameters
    ----------
    model: torch.nn.Module
        The network, which is not touched.
    example: torch.Tensor, tuple, dict or Example
        The arguments to run it with.
    layernorm: str
        Whether channels that LayerNorm runs over are locked, as in :func:`zennit_prune.trace`.
    whole: iterable of Site
        The products of stacks of matrices that lose whole matrices instead of rows and columns.
    examples: sequence
        Further arguments to run it with, as in :func:`zennit_prune.trace`.

    Returns
    -------
    Recording
        The trace.

    Raises
    ------
    PruneError
        If the network cannot be run or traced with an example.
    '''
    prepared = [replace(found, layernorm=layernorm, whole=frozenset(whole))
                for found in (prepare_example(model, example), *_prepare_further(model, examples))]
    axes, fields = label_axes(model)
    sizes = {name: TensorSize(tuple(tensor.shape), tensor.element_size(), isinstance(tensor, nn.Parameter))
             for name, tensor in unique_tensors(model).items()}
    shapes, outcomes = Shapes(), dict[Any, Outcome]()
    originals = {id(tensor): name for name, tensor in reversed(tensors_by_module(model))}

    def run(arguments: Example, network: nn.Module, training: bool) -> Run:
        guard = Outputs if training or arguments is not prepared[0] else Boundaries
        known = dict(outcomes)
        found = run_network(network, arguments, training, Tracer, fields, shapes, guard, known, originals)
        outcomes.update(known)  # not those of an attempt that failed
        found.claims += norm_claims(network, found.outputs)
        return found

    runs: dict[str, Run] = {}
    notes: list[str] = []
    untraced: list[str] = []
    for number, arguments in enumerate(prepared):
        where = f'examples[{number - 1}]: ' if number else ''
        found, remarks, reason = _with_name(where, partial(_both_modes, model, arguments, partial(run, arguments)))
        runs.update({f'{mode} {number + 1}' if number else mode: passed for mode, passed in found.items()})
        notes += [f'{where}{remark}' for remark in remarks if remark not in notes]
        untraced += [f'{where}{reason}'] * bool(reason)
    return Recording(prepared[0], axes, fields, sizes, runs, notes, shapes, '; '.join(untraced))


Recorded = tuple[dict[str, Run], list[str], str]


def _prepare_further(model: nn.Module, examples: Sequence[Any]) -> list[Example]:
    '''Check further examples, each of which may be a tensor, a tuple of arguments or a dict of keyword arguments.'''
    if not isinstance(examples, (list, tuple)):
        raise PruneError(f'examples={shown(examples)} is no sequence: give a list of further examples, each as example '
                         'is given, e.g. examples=[(x, 1)].')
    for number, example in enumerate(examples):
        if not isinstance(example, Example) and not tensors_in((example,)) and not isinstance(example, Mapping):
            raise PruneError(f'examples[{number}]={shown(example)} holds no tensor: examples is a list of further '
                             'examples, each a tensor, a tuple of arguments or a dict of keyword arguments. For one '
                             'with several arguments, write examples=[(x, ...)].')
    return [_with_name(f'examples[{number}]: ', partial(prepare_example, model, example))
            for number, example in enumerate(examples)]


def _with_name(where: str, act: Callable[[], Any]) -> Any:
    '''Return what a function returns; its errors begin with the name of the example that they are about.'''
    try:
        return act()
    except PruneError as error:
        if not where or isinstance(error, OriginalUsed):
            raise
        raise PruneError(f'{where}{error}') from error


def _both_modes(model: nn.Module, arguments: Example, run: Callable[[nn.Module, bool], Run]) -> Recorded:
    '''Run a network with an example; return its passes by mode, remarks, and why it did not run in training mode.'''
    runs: dict[str, Run] = {}
    notes: list[str] = []
    try:
        runs['eval'] = run(_marked_copy(model), False)
    except ForwardError as error:
        runs['eval'] = _run_otherwise(model, arguments, run, error)
    untraced = ''
    try:
        try:
            runs['train'] = run(_marked_copy(model, arguments.device), True)
        except ForwardError:
            if arguments.device == 'real':
                raise
            runs['eval'], runs['train'] = _run_on_values(model, arguments, run)
        if runs['train'].draws and arguments.device == 'meta':
            notes.append('the network draws random numbers when it is trained, and may branch on them: one path '
                         'through it is proven')
        if runs['train'].is_like(runs['eval']):
            del runs['train']
    except OriginalUsed:
        raise
    except (ForwardError, PruneError) as error:
        untraced = str(error)
        notes.append(f'the network does not run in training mode with this example ({error}): only evaluation is '
                     'proven')
    if arguments.device == 'real':
        notes.append('the network needs values, so it was traced on real tensors: one path through it is proven')
    return runs, notes, untraced


def _marked_copy(model: nn.Module, device: str = 'meta') -> nn.Module:
    network = structural_copy(model, device)
    mark_attributes(network)
    return network


def _run_otherwise(model: nn.Module, example: Example, run: Callable[[nn.Module, bool], Run],
                   first: ForwardError) -> Run:
    '''Run the network with the batch that was given, then with real values, after its first run failed.'''
    last = first
    example.resize = False
    for example.device in ('meta', 'real'):
        try:
            return run(_marked_copy(model, example.device), False)
        except ForwardError as error:
            last = error
    arguments = example.kwargs or example.args
    shapes = [tuple(tensor.shape) for tensor in tensors_in(arguments)]
    remedy = ('What torch.jit.script compiles cannot be followed: call the function itself, or set PYTORCH_JIT=0 in '
              'the environment before Python starts.' if TORCHSCRIPT in str(last) else 'Give an example that the '
              'network accepts: a tensor, a tuple of arguments, or a dict of keyword arguments.'
              + advice(model, arguments, last))
    raise PruneError(f'the network does not run with the example given, tensors of shape {shapes}: module '
                     f'{last.module or type(model).__name__!r} raised {str(last).rstrip(".: ")}. {remedy}') from last


def _run_on_values(model: nn.Module, example: Example, run: Callable[[nn.Module, bool], Run]) -> tuple[Run, Run]:
    '''Run both modes with real values, for a network that needs values in training mode only.'''
    example.device = 'real'
    try:
        training = run(_marked_copy(model, 'real'), True)
        return run(_marked_copy(model, 'real'), False), training
    except (ForwardError, PruneError):
        example.device = 'meta'
        raise


def label_axes(model: nn.Module) -> tuple[list[Axis], dict[str, list[Field]]]:
    '''Give every index of every dimension of every parameter and buffer a label of its own, from 1 on.

    An index of the second dimension of a grouped convolution's weight (its inputs; of a transposed one, its outputs) is
    another channel in each group: it gets a label for each.
    '''
    axes: list[Axis] = []
    fields: dict[str, list[Field]] = {}
    start = 1
    grouped = {id(tensor): module.groups for _, module in modules_by_name(model)
               if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
               for tensor in weights_of(module) if not (module.transposed and len(tensor) == module.groups)}
    for name, tensor in unique_tensors(model).items():
        if not tensor.is_floating_point():
            continue
        fields[name] = []
        for dim, size in enumerate(tensor.shape):
            blocks = grouped.get(id(tensor), 1) if dim == 1 else 1
            if size > 1 and blocks > 1:
                labels = in_rows(Labels(np.arange(start, start + blocks * size)), blocks)
                axes.append(Axis(name, dim, blocks * size, start, blocks))
                fields[name].append(BlockField.of_blocks(labels, tuple(tensor.shape)))
                start += blocks * size
            elif size > 1:
                axes.append(Axis(name, dim, size, start))
                fields[name].append(Field.along(Labels(np.arange(start, start + size)), dim, tensor.dim()))
                start += size
    return axes, fields
