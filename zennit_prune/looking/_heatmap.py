'''Heatmaps: the relevance of every input pixel, of the whole network or of what flows through single channels.'''
from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import PruneError, names_options
from ..graph._graph import ChannelGraph, check_graph, trace
from ..graph._groups import ChannelGroup
from ..relevance._attribute import (
    Attribution,
    Reader,
    Rules,
    attributing,
    checked_composite,
    differentiable,
    propagate,
)
from ..relevance._canonize import GraphCanonizer
from ..relevance._initial import Initial, Origin
from ..relevance._nonfinite import why_not_finite, without_nan
from ..relevance._outputs import Output, check_output
from ..relevance._sites import ActivationSite, find_sites
from ..tracing._boundaries import Place
from ..util._arguments import call_network
from ..util._isolation import exact_pass
from ..util._loaders import Batch
from ..util._networks import tensors_in, unwrapped
from ..util._samples import sample_list

AT_ONCE = 16  # samples in one backward pass for several channels, repeated ones counted: larger batches are slower
Channel = tuple[str | ChannelGroup, int | Sequence[int]]  # a group, and one position in it or several


@names_options()
def heatmap(model: nn.Module, composite: Rules | None, x: Any, target: Any = 'predicted',
            initial: Initial = 'one-hot', *, channel: Channel | None = None, graph: ChannelGraph | None = None,
            output: Output = None) -> torch.Tensor:
    '''Compute the relevance of every input pixel, summed over the input's channels.

    With ``channel``, only the relevance that flows through single channels of the network is shown. The relevance that
    arrives at an activation site of the channel, a tensor that carries its complete value, is kept there for this
    channel alone and propagated on to the input. Where a group has several sites (a residual stream), this is done at
    each of them, and the mean is returned, as the score of a channel is a mean over sites. Over all channels, the
    heatmaps of a group with one site sum to the relevance that flows through this site; in a network without branches,
    that is the whole heatmap.

    Parameters
    ----------
    model: torch.nn.Module
        The network, the original or a masked or pruned one; it is copied, never changed.
    composite: zennit.core.Composite, Preset or None
        The rules, or a preset for its rules; None for the recommended ones (epsilon). The network is canonized from its
        graph after the composite's own canonizers.
    x: torch.Tensor, tuple, mapping or list
        The inputs, shape (N, C, H, W): a tensor, a tuple of arguments, keyword arguments, or a list of samples.
    target: torch.Tensor, callable or ``'predicted'``
        Class indices of shape (N,), rows of the output's shape, or a function from the output to the relevance at the
        output; see :func:`zennit_prune.relevance.initial_relevance`.
    initial: str or callable
        The relevance at the target: ``'one-hot'``, ``'logit'``, ``'softmax'``, ``'contrastive'``, ``'cross-entropy'``,
        ``'value'`` for regressions, or a function of the output.
    channel: tuple of (str or ChannelGroup, int or sequence of int), optional
        A group and a position in it, e.g. ``('layer1.0.conv1', 3)``, or several positions, ``('layer1.0.conv1', [3,
        5])``. The group is given as such, by its name, or by the name of a layer that belongs to one group only.
    graph: ChannelGraph, optional
        An earlier trace of this network, so that it need not be traced again.
    output: int, str or callable, optional
        The output that relevance starts from, where the network returns several tensors: an index, a key or attribute,
        or a function of what it returns, whose result has its classes in dimension 1.

    Returns
    -------
    torch.Tensor
        On the CPU, shape (N, H, W); (K, N, H, W) for a sequence of K channels. For inputs that are no images, the
        second dimension is summed where there are more than two.

    Raises
    ------
    PruneError
        If inputs or targets do not fit, or relevance is not finite; for ``channel``, if the group is unknown, a
        position is out of range, or the group's relevance cannot be read or does not arrive.

    See Also
    --------
    heatmap_image : Draws heatmaps.
    agreement : Compares the heatmaps of two networks.

    References
    ----------
    Heatmaps are layer-wise relevance propagation, S. Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier
    Decisions by Layer-Wise Relevance Propagation", PLOS ONE 10(7), 2015. Heatmaps of single channels are the
    conditional ones of R. Achtibat et al., "From attribution maps to human-understandable explanations through Concept
    Relevance Propagation", Nature Machine Intelligence 5, 2023.

    Examples
    --------
    >>> import torch
    >>> import zennit_prune as zp
    >>> from zennit.composites import EpsilonPlus
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
    ...                             torch.nn.Linear(144, 2))
    >>> x = torch.randn(3, 1, 8, 8)
    >>> whole = zp.heatmap(model, EpsilonPlus(), x)
    >>> whole.shape
    torch.Size([3, 8, 8])
    >>> parts = zp.heatmap(model, EpsilonPlus(), x, channel=('0', range(4)))
    >>> parts.shape
    torch.Size([4, 3, 8, 8])
    >>> torch.allclose(parts.sum(0), whole, atol=1e-5)
    True
    '''
    if graph is not None:
        check_graph(graph)
    check_output(output)
    origin = Origin(target, initial, output, inputs=x)
    if channel is not None:
        return _through_channels(model, composite, x, origin, channel, graph)
    return explained(model, composite, x, origin, graph).maps


class Explained(NamedTuple):
    '''Heatmaps, the relevance at the output that they start from, and what the network predicts there.'''

    maps: torch.Tensor
    start: torch.Tensor
    predicted: torch.Tensor


def explained(model: nn.Module, composite: Rules | None, x: Any, origin: Origin, graph: ChannelGraph | None = None,
              classes: Origin | None = None) -> Explained:
    '''Return the heatmaps of a network, their start and its predictions, as ``classes``, or ``origin``, reads them.'''
    model = unwrapped(model)
    composite = checked_composite(composite)
    canonizer = GraphCanonizer(model, x) if graph is None else GraphCanonizer.from_recording(graph._recording)
    with attributing(model, composite, canonizer) as (network, _, _), torch.enable_grad():
        inputs = differentiable(x, network)
        pixels = Pixels.of(inputs)
        output = origin.chosen(call_network(network, inputs))
        start = origin.relevance(output)
        arrived = propagate(output, start, pixels.tensors)
    if not without_nan(output).all():
        raise PruneError(f'the output is not finite: {why_not_finite(model, x) or "check the network"}.')
    return Explained(_finite(pixels.summed(arrived), model, x), start,
                     (classes or origin).predicted(output))


class Pixels(NamedTuple):
    '''The inputs whose relevance a heatmap shows: a tensor with all samples, or one tensor for each sample.'''

    tensors: list[torch.Tensor]
    one_each: bool

    @classmethod
    def of(cls, inputs: Any) -> Pixels:
        '''Return the first floating-point input, or that of each sample in a list of samples.'''
        samples = sample_list(inputs)
        found = [_first_floating(part) for part in ([inputs] if samples is None else samples)]
        if len({tensor.shape for tensor in found}) > 1:
            raise PruneError(f'the images have shapes {", ".join(str(tuple(tensor.shape)) for tensor in found)}: '
                             'heatmaps are stacked, so that one call takes images of one size.')
        return cls(found, samples is not None)

    def summed(self, arrived: Sequence[torch.Tensor | None]) -> torch.Tensor:
        '''Return the relevance that arrived, summed over the channels of the input, on the CPU.'''
        if all(relevance is None for relevance in arrived):
            raise PruneError('no relevance arrives at the input: the output does not depend on it, or what reads it '
                             'runs without gradients (torch.no_grad(), .detach()). Let that part run with gradients.')
        found = [torch.zeros_like(tensor) if relevance is None else relevance.detach()
                 for tensor, relevance in zip(self.tensors, arrived)]
        relevance = (torch.stack(found) if self.one_each else found[0]).cpu()
        return relevance.sum(1) if relevance.dim() > 2 else relevance


def _first_floating(inputs: Any) -> torch.Tensor:
    '''Return the first tensor that requires gradients.'''
    for tensor in tensors_in(inputs):
        if tensor.requires_grad:
            return tensor
    raise PruneError('a heatmap needs a floating-point input, e.g. an image; these are whole numbers, of tokens say. '
                     'To collect, plan and prune, no heatmap is needed.')


def _finite(heatmaps: torch.Tensor, model: nn.Module, x: Any) -> torch.Tensor:
    '''Return heatmaps, or raise with the reason where they are not finite.'''
    if not torch.isfinite(heatmaps).all():
        why = why_not_finite(model, x) or 'a rule divides by zero or overflows'
        raise PruneError(f'the relevance at the input is not finite: {why}.')
    return heatmaps


def _through_channels(model: nn.Module, composite: Rules | None, x: Any, origin: Origin, channel: Any,
                      graph: ChannelGraph | None) -> torch.Tensor:
    '''Return the heatmaps of single channels, shape (N, H, W), or (K, N, H, W) for a sequence of positions.'''
    group, position = _checked_channel(channel)
    model = unwrapped(model)
    composite = checked_composite(composite)
    graph = graph or trace(model, x, progress=False)
    found = known_group(graph, group)
    channels = _positions(found, position)
    sites = sites_of(graph, found)
    canonizer = GraphCanonizer.from_recording(graph._recording)
    places = [site.place for site in sites]
    with attributing(model, composite, canonizer, lambda network: Taps(network, places)) as attribution:
        maps = _finite(_conditioned(attribution, sites, x, origin, channels, found), model, x)
    return maps if _several(position) else maps[0]


def _checked_channel(channel: Any) -> tuple[str | ChannelGroup, Any]:
    '''Return the group and the position or positions in it, after a check of their form.'''
    if not isinstance(channel, (tuple, list)) or len(channel) != 2 or not isinstance(channel[0], (str, ChannelGroup)):
        raise PruneError(f"channel={channel!r} names no channel: give a group and a position in it, e.g. channel=('"
                         "layer1.0.conv1', 3), or several positions, channel=('layer1.0.conv1', [3, 5]).")
    return channel[0], channel[1]


class Taps(Reader):
    '''A reader that attaches a copy to each tensor, from which relevance is propagated back as from an output.'''

    def __init__(self, network: nn.Module, places: Sequence[Place]):
        super().__init__(network, places)
        self.ends: dict[Place, torch.Tensor] = {}

    def _catch(self, place: Place, value: Any) -> None:
        super()._catch(place, value)
        if place in self.caught:  # a copy, for the network may write into it; unseen by the modes that give rules
            with torch._C.DisableTorchFunction():
                self.ends[place] = tensors_in(value)[place.position].clone()

    def clear(self) -> None:
        super().clear()
        self.ends.clear()


def known_group(graph: ChannelGraph, group: str | ChannelGroup) -> ChannelGroup:
    '''Return the group of a graph that a name, or a group of another trace of the same network, stands for.'''
    found = graph.group(group.name if isinstance(group, ChannelGroup) else group)
    if isinstance(group, ChannelGroup) and found.size != group.size:
        raise PruneError(f'group {group.name!r} has {group.size} channels, but {found.size} in this network: it is of '
                         'another one.')
    return found


def sites_of(graph: ChannelGraph, group: ChannelGroup) -> list[ActivationSite]:
    '''Return the sites where the relevance of a group's channels is read.'''
    sites, missing = find_sites(graph)
    if group.name in missing:
        raise PruneError(f'the relevance of group {group.name!r} cannot be read: {missing[group.name]}.')
    return [site for site in sites if site.group == group.name]


def _several(position: Any) -> bool:
    '''Return whether several positions are given, rather than a number.'''
    return isinstance(position, Sequence) or getattr(position, 'ndim', 0) > 0


def _positions(group: ChannelGroup, position: Any) -> list[int]:
    '''Return one position or several as a list, each within the group.'''
    try:
        channels = [operator.index(item) for item in (position if _several(position) else [position])]
    except TypeError as error:
        raise PruneError(f'{position!r} is no position in group {group.name!r}: give a whole number, or a sequence of '
                         'them.') from error
    for item in channels:
        if not 0 <= item < group.size:
            raise PruneError(f'channel {item} is out of range: group {group.name!r} has {group.size} channels, 0 to '
                             f'{group.size - 1}.')
    if not channels:
        raise PruneError(f'no channel of group {group.name!r} is named: give at least one position.')
    return channels


def _conditioned(attribution: Attribution, sites: Sequence[ActivationSite], x: Any, origin: Origin,
                 channels: Sequence[int], group: ChannelGroup) -> torch.Tensor:
    '''Return the heatmaps of several channels of a group, shape (K, N, H, W).'''
    network, taps, registered = attribution
    batch = Batch.of((x, None), network)
    number = batch.size
    at_once = max(1, AT_ONCE // number)

    def run(batch: Batch) -> tuple[Pixels, torch.Tensor]:
        taps.clear()
        inputs = differentiable(batch, network)
        pixels = Pixels.of(inputs)
        return pixels, origin.chosen(call_network(network, inputs))

    maps = []
    with torch.enable_grad():
        try:
            pixels, output = run(batch)
            caught = dict(taps.caught)
            arrived = propagate(output, origin.relevance(output), list(caught.values()), True)
            relevance = {site: values.detach() for place, values in zip(caught, arrived) if values is not None
                         for site in sites if site.place == place}
            if not relevance:
                raise PruneError(f'no relevance arrives at group {group.name!r}: the target does not depend on it, or '
                                 'it is inside a gate, which rules hold constant.')
            covered = sum((torch.bincount(site.positions.reshape(-1), minlength=site.size + 1) > 0).double()
                          for site in relevance)
            repeated = 1
            for first in range(0, len(channels), at_once):
                chosen = channels[first:first + at_once]
                if len(chosen) != repeated:  # else the graph of the last pass serves once more
                    repeated = len(chosen)
                    pixels, _ = run(batch.only(torch.arange(number, device='cpu').repeat(repeated)))
                seeds = {site.place: torch.cat([_kept(site, values, item, covered) for item in chosen])
                         for site, values in relevance.items()}
                maps.append(_from_sites(taps, seeds, pixels).unflatten(0, (repeated, number)))
        finally:
            taps.clear()
            for hook in list(registered.hook_refs):
                hook.remove()
    return torch.cat(maps)


def _from_sites(taps: Taps, seeds: dict[Place, torch.Tensor], pixels: Pixels) -> torch.Tensor:
    '''Propagate relevance given at activation sites to the input.'''
    ends = [taps.ends[place] for place in seeds]
    try:
        with exact_pass():
            arrived = torch.autograd.grad(ends, pixels.tensors, list(seeds.values()), retain_graph=True,
                                          allow_unused=True)
    except RuntimeError as error:
        raise PruneError(f'relevance cannot be propagated from single channels of this network: {error}.') from error
    return pixels.summed(arrived)


def _kept(site: ActivationSite, relevance: torch.Tensor, channel: int, covered: Any) -> torch.Tensor:
    '''Return the relevance of one channel at a site, zero elsewhere, divided by the number of sites that hold it.'''
    shape = [1] * relevance.dim()
    for dim, size in zip(site.dims, site.positions.shape):
        if relevance.shape[dim] != size:
            raise PruneError(f'relevance at {site.place.module!r} has shape {tuple(relevance.shape)}, but {size} '
                             f'entries along dimension {dim} were traced: give inputs of the size that was traced.')
        shape[dim] = size
    mask = (site.positions == channel).reshape(shape).to(relevance)
    return relevance * (mask / float(covered[channel].clamp(min=1)))
