'''Keep the accuracy of a pruned network without labels, gradients or epochs.

Layer by layer, in the order of the forward pass, least squares refits the weights so that each target (see
``targets.py``) is what it was in the original network, on reference inputs, fed with what the repaired layers before
give. The solution is written into the layer and its BatchNorm, whose statistics become those of the new weights, so
that training can go on.
'''
from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from zennit.types import BatchNorm

from .attribute import call_network
from .errors import PruneError, PruneWarning
from .layers import LayerCall
from .loaders import batch_size, batches, only
from .networks import copied, map_tensors, tensors_in, unique_tensors
from .plan import Plan
from .regression import FOLDS, RIDGES, Change, Moments
from .targets import Repairable, Target, find_targets
from .walk import Walk

METHODS = ('refit', 'bias', 'batchnorm', 'none')
CHUNK = 50  # inputs that run at once
LARGEST = 1536  # features that are solved for at once; a layer with more is refitted block by block
DEAD = 1e-4  # of the largest factor of a BatchNorm: a channel that it scales by less is left as it is


def repair(small: nn.Module, model: nn.Module, plan: Plan, data: Any, method: str = 'refit',
           progress: bool = True) -> nn.Module:
    '''Repair a pruned network with a few unlabelled inputs.

    Parameters
    ----------
    small: torch.nn.Module
        The pruned network; it is left as it is.
    model: torch.nn.Module
        The original.
    plan: Plan
        What was removed from it.
    data: torch.Tensor or iterable
        Inputs, or a loader; labels are ignored. Pictures are used with their mirror images. Activations of one layer
        are held for all of them.
    method: str
        ``'refit'``: least squares with a ridge from cross-validation over inputs; a layer that it does not improve in
        inputs that were held out keeps its weights. ``'bias'``: biases make up for the mean error. ``'batchnorm'``:
        the statistics of BatchNorm are estimated anew. ``'none'``: a copy.
    progress: bool
        Show a progress bar on standard error.

    Returns
    -------
    torch.nn.Module
        A new network.

    Raises
    ------
    PruneError
        If the networks do not fit the plan or the inputs, or there is no input.
    '''
    if method not in METHODS:
        raise PruneError(f'method={method!r} is unknown: use one of {", ".join(map(repr, METHODS))}.')
    result = copied(small)
    if method == 'none':
        return result
    flags = {module: module.training for module in result.modules()}
    try:
        chunks = list(input_chunks(data, result, mirrored=method == 'refit'))
        with torch.no_grad():
            if method == 'batchnorm':
                _reestimate(result, [inputs for inputs, _ in chunks])
            else:
                _refit(result.eval(), copied(model).eval(), plan, chunks, method, progress)
    finally:
        for module, flag in flags.items():
            module.training = flag
    return result


def input_chunks(data: Any, network: nn.Module, mirrored: bool) -> Iterator[tuple[Any, torch.Tensor]]:
    '''Inputs that run at once, and the fold of each; the mirror image of an input is in its fold.'''
    device = next((tensor.device for tensor in network.parameters()), torch.device('cpu'))
    start = 0
    loader: Iterable[Any] = [data] if isinstance(data, dict) else data
    for inputs, _ in batches(loader):
        inputs = map_tensors(lambda tensor: tensor.detach().to(device), inputs)
        size = batch_size(inputs)
        for first in range(0, size, CHUNK):
            part = only(inputs, size, slice(first, first + CHUNK))
            folds = torch.arange(start + first, start + first + batch_size(part)) % FOLDS
            yield part, folds
            if mirrored and all(tensor.dim() == 4 for tensor in tensors_in(part)):
                yield map_tensors(lambda tensor: tensor.flip(-1), part), folds
        start += size
    if not start:
        raise PruneError('there is no input to repair with: the data are empty.')


def _reestimate(network: nn.Module, chunks: Sequence[Any]) -> None:
    norms: list[Any] = [module for module in network.modules() if isinstance(module, BatchNorm)]
    if not any(norm.running_mean is not None for norm in norms):
        warnings.warn('the network has no BatchNorm with statistics: nothing was repaired.', PruneWarning, stacklevel=3)
    network.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for inputs in chunks:
        call_network(network, inputs)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def _refit(small: nn.Module, model: nn.Module, plan: Plan, chunks: Sequence[tuple[Any, torch.Tensor]], method: str,
           progress: bool) -> None:
    targets = find_targets(plan.graph.recording.runs['eval'], small)
    kept = plan.graph.kept(plan.removed)
    names = {id(tensor): name for name, tensor in unique_tensors(small).items()}
    sites = {target.site for target in targets}
    wanted = {layer.site for target in targets for layer in target.layers}
    walks = [(Walk(model, inputs, sites), Walk(small, inputs, sites, wanted)) for inputs, _ in chunks]
    refitted = 0
    try:
        for target in tqdm(targets, method, disable=not progress, leave=False):
            views = [View(target, walk, chunk, kept, names) for walk, chunk in zip(walks, chunks)]
            layers = [Layer(small, layer, [view.calls[number] for view in views], names)
                      for number, layer in enumerate(target.layers)]
            layers = [layer for layer in layers if layer.owned]
            for pieces in _pieces(layers):
                change = _change(pieces, views, RIDGES if method == 'refit' else ())
                if change is not None:
                    _apply(change, pieces, views)
                    refitted += 1
            for layer in layers:
                layer.settle()
    finally:
        for pair in walks:
            for walk in pair:
                walk.leave()
    if not targets:
        warnings.warn('the network has no layer that can be refitted: its BatchNorm is estimated anew.', PruneWarning,
                      stacklevel=3)
        _reestimate(small, [inputs for inputs, _ in chunks])


class View:
    '''A target and its layers as one chunk of inputs shows them.'''

    def __init__(self, target: Target, walks: tuple[Walk, Walk], chunk: tuple[Any, torch.Tensor], kept: Any,
                 names: Any):
        before, after = (walk.next() for walk in walks)
        assert before is not None and after is not None and before.site == after.site == target.site
        inputs, self.folds = chunk
        self.value = after.value
        self.calls = [LayerCall(layer.site.function, *after.calls.pop(layer.site), batch_size(inputs))
                      for layer in target.layers]
        first = self.calls[0]
        stay = kept.get(names.get(id(first.weight), ''), {}).get(0)
        wanted = before.value
        if stay is not None:
            wanted = wanted.index_select(first.channel_dim, torch.from_numpy(stay).to(wanted.device))
        self.wanted = wanted


class Layer:
    '''A layer that can be refitted, with its calls on all chunks.'''

    def __init__(self, network: nn.Module, layer: Repairable, calls: Sequence[LayerCall], names: dict[int, str]):
        self.calls = calls
        self.weight: Any = calls[0].weight
        self.bias: Any = calls[0].bias
        self.owned = id(self.weight) in names  # and not computed
        norm: Any = None if layer.batch_norm is None else network.get_submodule(layer.batch_norm)
        self.norm = norm
        self.scale: Any = torch.ones(len(self.weight), dtype=torch.float64, device=self.weight.device)
        if self.norm is not None:
            self.bias = self.norm.bias
            self.scale = torch.rsqrt(self.norm.running_var.double() + self.norm.eps)
            if self.norm.weight is not None:
                self.scale = self.scale * self.norm.weight.double()
        self.alive = self.scale.abs() > DEAD * self.scale.abs().max()
        self.changed = False

    @property
    def groups(self) -> int:
        return self.calls[0].groups

    def add(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        '''Change what the layer contributes to its target; returned is the part of the weight that can be.'''
        shape = (-1, *[1] * (self.weight.dim() - 1))
        weight = weight * self.alive.view(shape)
        own = weight / torch.where(self.alive, self.scale, 1).view(shape)
        self.weight += own.to(self.weight)
        if bias is not None:
            self.bias += bias.to(self.bias)
        if self.norm is not None:
            for call in self.calls:  # what the BatchNorm reads
                call.result += call.response(own.to(self.weight))
        self.changed = True
        return weight.to(self.weight)

    def settle(self) -> None:
        '''Give the BatchNorm the statistics of the new weights, without changing what it returns.'''
        if not self.changed or self.norm is None or self.norm.weight is None or self.norm.bias is None:
            return
        outputs = [call.result.movedim(call.channel_dim, 0).flatten(1).double() for call in self.calls]
        count = sum(output.shape[1] for output in outputs)
        mean = torch.stack([output.sum(1) for output in outputs]).sum(0) / count
        variance = torch.stack([(output - mean.unsqueeze(1)).square().sum(1) for output in outputs]).sum(0) / count
        self.norm.weight.copy_(self.scale * (variance + self.norm.eps).sqrt())
        self.norm.bias += (self.scale * (mean - self.norm.running_mean)).to(self.norm.bias)
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(variance)


Piece = tuple[Layer, slice]  # some input channels of each group of a layer


def _pieces(layers: Sequence[Layer]) -> Iterator[list[Piece]]:
    '''What is solved for at once: all layers of a target, or, where that is too large, parts of one.'''
    features = [layer.weight[0].numel() for layer in layers]
    if all(layer.groups == 1 for layer in layers) and sum(features) <= LARGEST:
        if layers:
            yield [(layer, slice(None)) for layer in layers]
        return
    for layer, size in zip(layers, features):
        channels = layer.weight.shape[1]
        step = max(1, channels * LARGEST // size)
        for start in range(0, channels, step):
            yield [(layer, slice(start, start + step))]


def _change(pieces: Sequence[Piece], views: Sequence[View], ridges: tuple[float, ...]) -> Change | None:
    moments = Moments(any(layer.bias is not None for layer, _ in pieces))
    for position, view in enumerate(views):
        features = torch.cat([layer.calls[position].features(channels) for layer, channels in pieces], 2)
        errors = view.calls[0].outputs(view.wanted - view.value)
        if not ridges:
            features = features[:, :, :0]
        folds = view.folds.to(errors.device).repeat_interleave(max(1, len(errors) // len(view.folds)))
        for fold in view.folds.unique().tolist():
            chosen = folds == fold
            moments.add(fold, *(part[chosen].permute(1, 2, 0, 3).flatten(2) for part in (features, errors)))
    return moments.solve(ridges)


def _apply(change: Change, pieces: Sequence[Piece], views: Sequence[View]) -> None:
    '''Write a change into the layers and into the targets of all chunks.'''
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
        weight = layer.add(whole, given)
        for view, call in zip(views, layer.calls):
            delta = call.response(weight)
            if given is not None:
                delta += given.to(delta).view(-1, *[1] * (delta.dim() - 1 - call.channel_dim))
            view.value += delta
