'''Keep the accuracy of a pruned network without labels, gradients or epochs.

Layer by layer, in the order of the forward pass, the weights are refitted by least squares on reference inputs, so that
each target (see ``_targets.py``) gets the value that it has in the original network. Each layer reads what the repaired
layers before it return. The solution is written into the layer and its BatchNorm, whose statistics become those of the
new weights, so that training can go on.
'''
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product, repeat
from math import prod
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from zennit.types import BatchNorm

from ..errors import PruneError, names_options, unknown, warn
from ..planning._plan import Plan, checked_pair
from ..relevance._nonfinite import why_not_finite
from ..surgery._replay import Deletion
from ..surgery._verify import evaluating
from ..tracing._parametrized import copy_values, parametrizations, plain
from ..tracing._trace import Recording
from ..util._arguments import call_network, spread
from ..util._display import some
from ..util._isolation import exact_pass
from ..util._loaders import Batch
from ..util._networks import copied, device_of, map_tensors, tensors_by_module, tensors_in
from ..util._samples import batch_size
from ._chunks import Chunk, Inputs, wide
from ._lockstep import Lockstep
from ._references import constants, warn_of_missing_classes
from ._regression import FIRST_RIDGE, RIDGES, Change, Moments
from ._targets import LayerCall, Repairable, Target, find_targets
from ._trial import holdout_check, outputs

MEMORY = 4 * 2 ** 30  # bytes for activations: fewer inputs are used where these would take more
METHODS = ('refit', 'bias', 'batchnorm', 'none')
LARGEST = 1536  # the most features that are solved for at once; a layer with more is refitted block by block
PER_FEATURE, ENOUGH = 64, 16384  # positions are thinned out as long as so many samples remain
FEW = 16  # with fewer inputs, the old statistics keep a share
DEAD = 1e-4  # a channel is left as it is where its BatchNorm scales it by less than this share of the largest factor


def norms_of(network: nn.Module) -> list[Any]:
    '''Return every BatchNorm that holds statistics.'''
    return [module for module in network.modules() if isinstance(module, BatchNorm)
            and module.running_mean is not None]  # type: ignore[union-attr]


def reestimate(network: nn.Module, chunks: Sequence[Any]) -> None:
    '''Estimate all statistics of BatchNorm from inputs anew.'''
    norms = norms_of(network)
    before = [(norm.momentum, norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    try:
        for inputs in chunks:
            call_network(network, map_tensors(torch.clone, inputs))
    except PruneError as error:
        raise PruneError(f'BatchNorm cannot be estimated anew: {error} Statistics take more than one value of each '
                         'channel: give more inputs.') from error
    for norm, (momentum, mean, variance) in zip(norms, before):
        norm.momentum = momentum
        if not norm.num_batches_tracked:  # of a head that runs in training only
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


def update_batchnorm_statistics(network: nn.Module, chunks: Sequence[Any]) -> None:
    '''Set the statistics of every BatchNorm to those of its inputs, and its weight and bias so that its outputs stay.

    With few inputs, the old statistics keep a share: a refitted layer returns nearly the values that it did before.
    '''
    sums: dict[Any, list[Any]] = {}

    def add(norm: nn.Module, args: Any, kwargs: Any) -> None:
        read = tensors_in((args, kwargs))[0].transpose(0, 1).flatten(1).double()
        terms = [read.shape[1], read.sum(1), read.square().sum(1)]
        sums[norm] = [old + new for old, new in zip(sums.get(norm, [0, 0, 0]), terms)]

    handles = [norm.register_forward_pre_hook(add, with_kwargs=True) for norm in norms_of(network)
               if norm.weight is not None]
    for inputs in chunks:
        call_network(network, map_tensors(torch.clone, inputs))
    for handle in handles:
        handle.remove()
    share = min(1.0, sum(map(batch_size, chunks)) / FEW)
    for norm, (count, total, squares) in sums.items():
        if count == 1:
            continue
        scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
        shift = norm.bias.double() - scale * norm.running_mean
        mean = share * total / count + (1 - share) * norm.running_mean
        square = share * squares / count + (1 - share) * (norm.running_var + norm.running_mean.double().square())
        variance = (square - mean.square()).maximum(DEAD * norm.running_var)  # training divides by it
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_(scale * (norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(shift + scale * norm.running_mean)


def checked_method(method: Any, option: str = 'method') -> str:
    '''Return the name of a method of repair; refuse any other, with the nearest one.'''
    if method not in METHODS:
        raise unknown(option, method, METHODS)
    return method


@names_options()
def repair(model: nn.Module, small: nn.Module, plan: Plan, data: Any, method: str = 'refit',
           progress: bool = True) -> nn.Module:
    '''Repair a pruned network with a few unlabelled inputs.

    Parameters
    ----------
    model: torch.nn.Module
        The original network; it is left as it is.
    small: torch.nn.Module
        The pruned network; it is left as it is.
    plan: Plan
        The plan by which ``small`` was pruned.
    data: torch.Tensor, mapping or iterable
        Inputs, or a loader of batches; labels are ignored. At most 1,024 inputs are used, a uniform subset beyond that;
        duplicates are dropped. Images are also mirrored and shifted. The activations of one layer are held for all
        inputs, so that fewer inputs are used where these would take more than about 4 GiB.
    method: str
        ``'refit'``: every layer is refitted by ridge regression, with the ridge chosen by cross-validation over inputs;
        a layer that a refit does not improve on held-out inputs keeps its weights. ``'bias'``: biases compensate for
        the mean error. ``'batchnorm'``: the statistics of BatchNorm are estimated anew. ``'none'``: a copy.
    progress: bool
        Show a progress bar on standard error.

    Returns
    -------
    torch.nn.Module
        A new network of the same class and shapes as ``small``.

    Raises
    ------
    PruneError
        If the networks do not fit the plan or the inputs, are given in the other order, or return values that are not
        finite; if there is no input; for an unknown method.

    Warns
    -----
    PruneWarning
        If the inputs show fewer than half of the classes that the network tells apart; if nothing could be repaired;
        if the repair brings the outputs for held-out inputs further from the original's, in which case it is left out.

    Notes
    -----
    Unless the inputs show clearly that it helps, a repair is tried with three quarters of them and judged by the rest;
    with fewer than 32 inputs, every quarter judges once.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(64, 3)
    >>> plan = zp.Plan(zp.trace(model, x)).remove('0', [0, 1, 2])
    >>> small = plan.apply(model)
    >>> better = zp.repair(model, small, plan, x, progress=False)
    >>> bool((better(x) - model(x)).square().mean() < (small(x) - model(x)).square().mean())
    True
    '''
    return repaired(model, small, plan, data, method, progress, classes_matter=True)


def repaired(model: nn.Module, small: nn.Module, plan: Plan, data: Any, method: str, progress: bool,
             in_place: bool = False, classes_matter: bool = False) -> nn.Module:
    '''Repair a pruned network as :func:`repair` does.

    Parameters
    ----------
    model, small, plan, data, method, progress:
        See :func:`repair`.
    in_place: bool
        Write into ``small``, which nobody else uses; it is as it was where the repair is left out or fails.
    classes_matter: bool
        Warn if the network is refitted on inputs that show few of its classes.
    '''
    checked_method(method)
    model, small = checked_pair('repair(model, small, plan, data)', model, small, plan)
    model = plan._checked_model(model)
    misfit = plan._misfit(small)
    if misfit:
        raise PruneError(f'the pruned network is not what the plan makes of the original: {misfit}. Give what '
                         'plan.apply(model) returned.')
    device = device_of(small)
    with torch.inference_mode(False), torch.no_grad(), exact_pass():
        small = small if in_place else copied(small)
        if method == 'none':
            return small
        inputs = Inputs(data, device, model, _of_further_examples(plan.graph._recording))
        _warn_of_further_parts(plan.graph._recording, inputs.left_out)
        with evaluating(small):
            targets = find_targets(plan.graph._recording.runs['eval'], small)
            network = _fitted(_widened(model), _widened(small, in_place=True), targets, plan, inputs, method,
                              progress, classes_matter)
        if network is not None:
            copy_values(network, small)
    return small


def _of_further_examples(recording: Recording) -> Callable[[Batch], bool]:
    '''Return a function that says whether a batch runs what a further example of the trace runs, by its flags.'''
    first, *further = (constants((example.args, example.kwargs)) for example in recording.examples)

    def of_further(batch: Batch) -> bool:
        own = constants(spread(batch.inputs))
        return own != first and own in further

    return of_further


def _warn_of_further_parts(recording: Recording, left_out: int) -> None:
    '''Warn that the repair is for the first of several examples.'''
    parts = recording.further_parts
    if parts or left_out:
        beside = f'; {left_out} inputs of further examples are left out' if left_out else ''
        warn(f'the repair fits the layers that the first example of the trace runs{beside}. What only further examples '
             f'run stays as it is ({some(map(repr, parts), 5) or "no layer"}): check these tasks with and without it')


def _fitted(original: nn.Module, before: nn.Module, targets: Sequence[Target], plan: Plan, inputs: Inputs, method: str,
            progress: bool, classes_matter: bool) -> nn.Module | None:
    '''Return a repaired copy of ``before``, or None, with a warning, where a repair does not help.

    Both networks are in evaluation mode and in single or double precision, and are not changed.
    '''
    if method != 'batchnorm':
        inputs.limit(MEMORY // _footprint(before, targets, inputs))

    def fitted_to(chosen: torch.Tensor) -> tuple[nn.Module, bool]:
        network, chunks = copied(before), inputs.chunks(chosen, varied=method == 'refit')
        fitted = method != 'batchnorm' and _refit(original, network, targets, plan, chunks, method, progress)
        if not fitted:
            reestimate(network, [chunk.inputs for chunk in chunks])
        return network.eval(), fitted

    network, fitted = fitted_to(inputs.order)
    if not fitted:
        lacking = '' if method == 'batchnorm' else 'the network has no layer that can be refitted, and '
        if not norms_of(network):
            reason = lacking or 'the network was left as it is: '
            warn(f'{reason}it has no BatchNorm with statistics: nothing was repaired.')
            return None
        if lacking:
            warn(f'{lacking}its BatchNorm is estimated anew.')
    problem = holdout_check(original, before, network, inputs, lambda chosen: fitted_to(chosen)[0])
    if problem:
        _refuse_broken((original, before), inputs)
        warn(f'the repair is left out: {problem}. More inputs may help.')
        return None
    if fitted and method == 'refit' and classes_matter:
        chunks = inputs.chunks(inputs.order)
        warn_of_missing_classes(original, (Batch(chunk.inputs) for chunk in chunks))
    return network


def _refuse_broken(networks: Sequence[nn.Module], inputs: Inputs) -> None:
    '''Raise where the original or the pruned network returns values that are not finite, with the reason.'''
    chunk = inputs.chunks(inputs.order)[0].inputs
    for name, network in zip(('original', 'pruned'), networks):
        returned, = outputs(network, [chunk])
        if not all(torch.isfinite(output).all() for output in returned):
            why = why_not_finite(network, chunk) or 'check its weights'
            raise PruneError(f'nothing can be repaired, as the {name} network returns values that are not finite: '
                             f'{why}.')


def _widened(network: nn.Module, in_place: bool = False) -> nn.Module:
    '''Return a copy in evaluation mode with plain weights, half precision turned into single precision.

    With ``in_place``, a network in evaluation mode that needs none of this is returned itself.
    '''
    if in_place and not parametrizations(network) and not any(wide(tensor) is not tensor
                                                              for _, tensor in tensors_by_module(network)):
        return network
    return plain(copied(network), freely=True)._apply(wide).eval()


def _footprint(network: nn.Module, targets: Sequence[Target], inputs: Inputs) -> int:
    '''Estimate the bytes that a refit holds for one input: three copies of activations in both networks.'''
    run = Lockstep(network, inputs.chunks(inputs.order[:1])[0].inputs, {target.site for target in targets},
                {layer.site for target in targets for layer in target.layers})
    most = 1
    try:
        for target in targets:
            stop = run.next()
            if stop is None:
                break
            held = [stop.value, *(call.input for call in stop.calls.values())]
            most = max(most, sum(tensor.numel() * tensor.element_size() for tensor in held))
            for layer in target.layers:
                stop.calls.pop(layer.site, None)
    finally:
        run.leave()
    return 6 * most


def _refit(model: nn.Module, small: nn.Module, targets: Sequence[Target], plan: Plan, chunks: Sequence[Chunk],
           method: str, progress: bool) -> bool:
    '''Refit all layers in the order of the forward pass; return whether there was any that can be refitted.'''
    deletion = Deletion(plan.graph._removed_labels(plan.removed))
    parameters = {id(parameter) for parameter in small.parameters()}
    sites = {target.site for target in targets}
    wanted = {layer.site for target in targets for layer in target.layers}
    runs: list[tuple[Lockstep, Lockstep]] = []
    found, changed, ridge = False, False, FIRST_RIDGE
    try:
        for chunk in chunks:
            runs.append((Lockstep(model, chunk.inputs, sites), Lockstep(small, chunk.inputs, sites, wanted)))
        for target in tqdm(targets, method, disable=not progress, leave=False):
            views = [View(target, pair, chunk.folds) for pair, chunk in zip(runs, chunks)]
            layers = [Layer(small, layer, [view.calls[number] for view in views], parameters)
                      for number, layer in enumerate(target.layers)]
            layers = [layer for layer in layers if layer.owned]
            layers = [layer for layer in layers if layer.channel_dim == layers[0].channel_dim]
            if not layers:
                continue
            found = True
            for view in views:
                view.narrow(deletion(target.fields)[1])
            for pieces in _pieces(layers, sum(map(_samples, layers[0].calls))):
                change = _change(pieces, views, RIDGES if method == 'refit' else (), ridge)
                if change is not None:
                    _apply(change, pieces, views)
                    changed, ridge = True, change.ridge
    finally:
        for pair in runs:
            for run in pair:
                run.leave()
    if changed:
        update_batchnorm_statistics(small, [chunk.inputs for chunk in chunks if not chunk.varied])
    return found


class View:
    '''The values of a target and the calls of its layers, for one chunk of inputs.

    Attributes
    ----------
    value, wanted: torch.Tensor
        The target in the pruned network and in the original.
    folds: torch.Tensor
        The fold of each input.
    calls: list of LayerCall
        The calls of the layers, in the pruned network.
    '''

    def __init__(self, target: Target, runs: tuple[Lockstep, Lockstep], folds: torch.Tensor):
        before, after = (run.next() for run in runs)
        if before is None or after is None or not before.site == after.site == target.site \
                or any(layer.site not in after.calls for layer in target.layers):
            raise PruneError(f'the network does not run as it was traced: {target.site.function!r} in '
                             f'{target.site.module or "the network itself"!r} was expected. What it does must not '
                             'depend on its inputs: give inputs like the example.')
        self.value, self.wanted, self.folds = after.value, before.value, folds
        self.calls = [after.calls.pop(layer.site) for layer in target.layers]

    def narrow(self, kept: Mapping[int, Any]) -> None:
        '''Remove channels from the wanted value; ``kept`` says which stay, by dimension.'''
        for dim, mask in kept.items():
            if self.wanted.shape[dim] == len(mask):
                stay = torch.from_numpy(mask.nonzero()[0]).to(self.wanted.device)
                self.wanted = self.wanted.index_select(dim, stay)


class Layer:
    '''A layer that can be refitted, with its calls on all chunks.'''

    def __init__(self, network: nn.Module, layer: Repairable, calls: Sequence[LayerCall], parameters: set[int]):
        self.calls = calls
        self.weight: Any = calls[0].weight
        self.owned = (id(self.weight) in parameters and self.weight.is_floating_point()  # not computed, and still
                      and all(call.intact for call in calls))                            # read as it was
        norm: Any = None if layer.batch_norm is None else network.get_submodule(layer.batch_norm)
        self.bias: Any = calls[0].bias if norm is None else norm.bias
        if id(self.bias) not in parameters:
            self.bias = None
        self.scale: Any = torch.ones(len(self.weight), dtype=torch.float64, device=self.weight.device)
        if norm is not None:
            self.scale = torch.rsqrt(norm.running_var.double() + norm.eps)
            if norm.weight is not None:
                self.scale = self.scale * norm.weight.double()
        self.alive = self.scale.abs() > DEAD * self.scale.abs().max()

    @property
    def groups(self) -> int:
        return self.calls[0].groups

    @property
    def channel_dim(self) -> int:
        return self.calls[0].channel_dim

    def add(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        '''Add to the weights and the bias of the layer, in units of its target.'''
        scale = torch.where(self.alive, self.scale, 1).view(-1, *[1] * (weight.dim() - 1))
        self.weight += (weight / scale).to(self.weight)
        if bias is not None:
            self.bias += bias.to(self.bias)


Piece = tuple[Layer, slice]  # a layer, and some input channels of each of its groups


def _samples(call: LayerCall) -> int:
    '''Return the number of positions of a layer's output, over all inputs.'''
    return call.shape.numel() // call.shape[call.channel_dim]


def _thinning(call: LayerCall, samples: int, width: int, chunk: int, chunks: int) -> tuple[slice, ...]:
    '''Return the positions to use in each direction of space: neighbours show nearly the same.

    Each chunk starts elsewhere, so that all alignments with the strides of layers are seen.
    '''
    space = call.shape[2:] if call.function != 'linear' else ()
    skips = [1] * len(space)
    enough = max(PER_FEATURE * width, ENOUGH)
    while any(skip < size for skip, size in zip(skips, space)):
        least = min((skip, dim) for dim, skip in enumerate(skips) if skip < space[dim])[1]
        if samples * skips[least] < enough * prod(skips) * (skips[least] + 1):
            break
        skips[least] += 1
    starts = list(product(*map(range, skips)))
    return tuple(map(slice, starts[chunk * len(starts) // chunks], repeat(None), skips))


def _pieces(layers: Sequence[Layer], samples: int) -> Iterator[list[Piece]]:
    '''Yield the layers that are solved for at once: all of a target, or parts of one where these are too large.'''
    features = [layer.weight[0].numel() for layer in layers]
    groups = max(layer.groups for layer in layers)
    if (all(layer.groups in (1, groups) for layer in layers)
            and groups * min(sum(features), samples) ** 2 <= LARGEST ** 2):
        yield [(layer, slice(None)) for layer in layers]
        return
    for layer, size in zip(layers, features):
        channels = layer.weight.shape[1]
        step = max(1, channels * LARGEST // size)
        for start in range(0, channels, step):
            yield [(layer, slice(start, start + step))]


def _change(pieces: Sequence[Piece], views: Sequence[View], ridges: tuple[float, ...], guess: float) -> Change | None:
    '''Solve for the change of some layers that brings a target closest to the wanted value; None if none helps.'''
    groups = max(layer.groups for layer, _ in pieces)
    width = sum(layer.weight[0, channels].numel() for layer, channels in pieces) if ridges else 0
    samples = sum(map(_samples, pieces[0][0].calls))
    calls = pieces[0][0].calls
    thinned = [_thinning(call, samples, width, chunk, len(calls)) for chunk, call in enumerate(calls)]

    def features(position: int) -> torch.Tensor:
        read = [layer.calls[position].features(channels, thinned[position]) for layer, channels in pieces]
        return torch.cat([each.expand(-1, groups, -1, -1) for each in read], 2)

    basis: torch.Tensor | None = None
    if samples < width:  # directions that no sample shows cannot be learnt
        every = [features(position).permute(1, 2, 0, 3).flatten(2) for position in range(len(views))]
        basis = torch.linalg.qr(torch.cat(every, 2))[0]
    moments = Moments(any(layer.bias is not None for layer, _ in pieces), width)
    for position, view in enumerate(views):
        call = pieces[0][0].calls[position]
        errors = view.wanted - view.value
        for layer, _ in pieces if ridges else ():  # weights that BatchNorm scales to nothing are not to grow
            errors = errors * layer.alive.view(-1, *[1] * (errors.dim() - 1 - call.channel_dim))
        errors = call.outputs(errors, groups, thinned[position])
        read = features(position) if ridges else errors[:, :, :0]
        if basis is not None:
            read = basis.mT @ read
        rows = torch.arange(len(errors), device=view.folds.device)
        inputs = rows * len(view.folds) // len(errors)  # several rows may come from one input
        folds = view.folds[inputs].to(errors.device)
        for fold in folds.unique().tolist():
            chosen = folds == fold
            moments.add(fold, *(part[chosen].permute(1, 2, 0, 3).flatten(2) for part in (read, errors)))
    change = moments.solve(ridges, guess)
    if change is not None and basis is not None:
        change.weight = basis.double() @ change.weight
    return change


def _apply(change: Change, pieces: Sequence[Piece], views: Sequence[View]) -> None:
    '''Write a change into the layers, and its effect into the targets of all chunks.'''
    start = 0
    bias: torch.Tensor | None = change.bias.flatten()
    for layer, channels in pieces:
        whole = torch.zeros_like(layer.weight, dtype=torch.float64)
        part = whole[:, channels]
        if change.weight.shape[1]:
            end = start + part[0].numel()
            part += change.weight[:, start:end].mT.reshape(part.shape)
            start = end
        given, bias = (bias, None) if layer.bias is not None else (None, bias)
        layer.add(whole, given)
        for view, call in zip(views, layer.calls):
            delta = call.response(whole.to(layer.weight))
            if given is not None:
                delta += given.to(delta).view(-1, *[1] * (delta.dim() - 1 - call.channel_dim))
            view.value += delta
