'''The start of relevance: the kinds of targets, and the relevance at the output that belongs to each.'''
from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import PruneError, nearest, unknown
from ..util._yielded import as_labels
from ._sites import accumulation_dtype

INITIAL = ('one-hot', 'logit', 'softmax', 'contrastive', 'cross-entropy')
UNKNOWN = 255  # the value of segmentation masks where the class is unknown
Initial = str | Callable[[torch.Tensor], torch.Tensor]


class Start(NamedTuple):
    '''One target of every sample.

    ``relevance`` gives the relevance at the output as a function of the output, as Zennit's ``attr_output`` does.
    ``given`` says which samples have such a target. ``classes`` holds its class, -1 where it is not a single one.
    '''

    relevance: Callable[[torch.Tensor], torch.Tensor]
    given: torch.Tensor
    classes: torch.Tensor | None = None


def initial_relevance(output: torch.Tensor, target: Any, initial: Initial) -> torch.Tensor:
    '''Return the relevance at the output that is propagated back, averaged over the targets of a sample.

    Parameters
    ----------
    output: torch.Tensor
        The network's output, shape (batch, classes) or (batch, classes, ...).
    target: torch.Tensor, callable, ``'predicted'`` or None
        One of

        - class indices, shape (batch,);
        - several per sample, shape (batch, T), -1 where a sample has fewer. Where T is the number of classes, they are
          read as rows;
        - one-hot (or weighted) rows of the output's shape;
        - for outputs with further dimensions, a mask of class indices, shape (batch, ...). No relevance starts where it
          is negative, or 255 if that is no class;
        - a function of the output that returns the relevance, as Zennit's ``attr_output``.
    initial: str or callable
        ``'one-hot'``: 1 at the target. ``'logit'``: the output at the target. ``'softmax'``: the gradient of the
        target's softmax probability. ``'contrastive'``: 1 at the target, -1 at the strongest other class.
        ``'cross-entropy'``: the gradient of each sample's cross-entropy, the output read as logits, averaged over
        the positions that have a target. Or a function of the output.

    Returns
    -------
    torch.Tensor
        As the output is shaped.

    Raises
    ------
    PruneError
        If target and output do not fit, or both ``target`` and ``initial`` are functions.

    Examples
    --------
    >>> import torch
    >>> from zennit_prune.relevance import initial_relevance
    >>> output = torch.tensor([[0.5, 2.0, 1.0]])
    >>> initial_relevance(output, torch.tensor([2]), 'one-hot')
    tensor([[0., 0., 1.]])
    >>> initial_relevance(output, 'predicted', 'logit')
    tensor([[0., 2., 0.]])
    >>> initial_relevance(output, torch.tensor([2]), 'contrastive')
    tensor([[ 0., -1.,  1.]])
    '''
    found = starts(output, target, initial)
    relevance = torch.zeros_like(output, requires_grad=False)
    for start, share in zip(found, shares(found)):
        relevance += start.relevance(output) * share.to(output.dtype).view(-1, *[1] * (output.dim() - 1))
    return relevance


def starts(output: torch.Tensor, target: Any, initial: Initial, classes: Sequence[int] | None = None) -> list[Start]:
    '''Return one start for each of a sample's targets; :func:`initial_relevance` averages them.

    Where ``classes`` are given, targets of others are ignored, and predictions and rivals are chosen among these.
    '''
    output = output.detach()
    check_target(target, initial)
    function = target if callable(target) else initial if callable(initial) else None
    if function is not None:
        if classes is not None and of_classes(target, classes) is None:
            raise PruneError(f'classes={tuple(classes)} needs a label for each sample where the initial relevance is a '
                             'function.')
        everyone = torch.ones(output.shape[:1], dtype=torch.bool, device=output.device)
        return [Start(lambda seen: _from_function(function, seen), everyone)]
    check_initial(initial, classes)

    def start(rows: torch.Tensor) -> Start:
        given = rows != 0
        one = torch.where(given.sum(1) == 1, given.int().argmax(1), -1) if rows.dim() == 2 else None
        return Start(lambda seen: _from_rows(rows, seen.detach(), initial, classes), given.flatten(1).any(1), one)

    return [start(rows) for rows in target_rows(output, target, classes)]


def check_initial(initial: Initial, classes: Sequence[int] | None = None) -> None:
    '''Raise unless relevance can start as ``initial`` says, as far as that is known without an output.'''
    if not callable(initial) and initial not in INITIAL:
        raise unknown('initial', initial, INITIAL, ' or a function of the output')
    if initial == 'contrastive' and classes is not None and len(classes) < 2:
        raise _no_rival()


def _no_rival() -> PruneError:
    return PruneError("initial='contrastive' needs a second class as the rival: give at least two classes, or use "
                      "'one-hot'.")


def shares(found: Sequence[Start]) -> list[torch.Tensor]:
    '''Return the weight of each start for each sample, such that the weights of a sample with any target sum to 1.'''
    given = [start.given.to(accumulation_dtype(start.given.device)) for start in found]
    number = sum(given, torch.zeros((), device='cpu')).clamp(min=1)
    return [each / number for each in given]


def _from_function(function: Callable[[torch.Tensor], torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    relevance = function(output.detach())
    if not isinstance(relevance, torch.Tensor) or relevance.shape != output.shape:
        got = tuple(relevance.shape) if isinstance(relevance, torch.Tensor) else type(relevance).__name__
        raise PruneError(f'the function for the initial relevance returned {got}, but the output has shape '
                         f'{tuple(output.shape)}: return a tensor of that shape.')
    if not torch.isfinite(relevance).all():
        raise PruneError('the function for the initial relevance returned values that are not finite.')
    return relevance.detach().to(output)


def _from_rows(rows: torch.Tensor, output: torch.Tensor, initial: Initial,
               classes: Sequence[int] | None) -> torch.Tensor:
    if initial == 'one-hot':
        return rows
    if initial == 'logit':
        return rows * output
    if initial == 'softmax':
        probability = output.softmax(1)
        return probability * (rows - (rows * probability).sum(1, keepdim=True))
    if initial == 'cross-entropy':
        if output.shape[1] == 1:
            raise PruneError(f'the output has shape {tuple(output.shape)}: the cross-entropy of a single class is '
                             'constant. Give the gradient of your loss, a function of the output, as initial=.')
        positions = (rows != 0).any(1).reshape(len(rows), -1).sum(1).clamp(min=1)
        return (output.softmax(1) * rows.sum(1, keepdim=True) - rows) / positions.view(-1, *[1] * (rows.dim() - 1))
    if len(classes or range(output.shape[1])) < 2:
        raise _no_rival()
    rivals = _among(output.masked_fill(rows != 0, -torch.inf), classes)
    rival = torch.zeros_like(output).scatter_(1, rivals.argmax(1, keepdim=True), 1.0)
    return rows - rival * rows.sum(1, keepdim=True) * (rivals.amax(1, keepdim=True) > -torch.inf)


def target_rows(output: torch.Tensor, target: Any, classes: Sequence[int] | None = None) -> list[torch.Tensor]:
    '''Return rows shaped as the output for any kind of target that is no function; zero where there is no target.'''
    if output.dim() < 2:
        raise PruneError(f'the output has shape {tuple(output.shape)}, without classes: give a function of the output '
                         'as initial=.')
    number = output.shape[1]
    if classes is not None and max(classes) >= number:
        raise PruneError(f'class {max(classes)} in classes={tuple(classes)} is unknown: the network has {number} '
                         f'classes, 0 to {number - 1}.')
    check_target(target)
    if isinstance(target, str):
        target = _among(output, classes).argmax(1)
    if target is None:
        raise PruneError("there are no labels: give a loader of (inputs, labels) pairs, target='predicted', or a "
                         'function of the output as initial=.')
    target = as_labels(target).to(output.device)
    if target.is_floating_point() and not torch.isfinite(target).all():
        raise PruneError('the targets hold values that are not finite.')
    rows = [target.to(output.dtype)] if target.shape == output.shape else _one_hot(target, output)
    if classes is not None:
        wanted = torch.zeros(number, dtype=output.dtype, device=output.device)
        wanted[list(classes)] = 1
        rows = [each * wanted.view(-1, *[1] * (output.dim() - 2)) for each in rows]
    return rows


def check_target(target: Any, initial: Initial = 'one-hot') -> None:
    '''Raise for a target of an unknown name, and where both target and ``initial`` are functions.'''
    if isinstance(target, str) and target != 'predicted':
        raise PruneError(f"target={target!r} is unknown: give class indices, rows, a function, or "
                         f"'predicted'{nearest(target, ['predicted']) or '.'}")
    if callable(target) and callable(initial):
        raise PruneError('both target and initial are functions of the output: give one of them as a function; it '
                         'returns all of the initial relevance.')


def check_labels(labels: torch.Tensor, classes: int) -> None:
    '''Raise unless all class indices are among those of the network.'''
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise PruneError(f'label {int(wrong[0])} is out of range: the network has {classes} classes, from 0 to '
                         f'{classes - 1}.')


def _one_hot(target: torch.Tensor, output: torch.Tensor) -> list[torch.Tensor]:
    '''Return rows for class indices, for several of them per sample, or for a mask of them.'''
    expected = (output.shape[0], *output.shape[2:])
    several = output.dim() == 2 and target.dim() == 2 and len(target) == len(output) and target.dtype != torch.bool
    if (target.shape != expected and not several) or target.is_floating_point():
        raise PruneError(f'targets of shape {tuple(target.shape)} and type {target.dtype} do not fit an output of '
                         f'shape {tuple(output.shape)}: give class indices of shape {tuple(expected)}, or rows shaped '
                         'as the output.')
    classes, target = output.shape[1], target.long()
    none = torch.zeros_like(target, dtype=torch.bool)
    if target.dim() > 1:
        none = (target < 0) | ((target == UNKNOWN) & (classes <= UNKNOWN) & (not several))
    check_labels(target[~none], classes)
    if several:
        ordered = target.sort(1).values
        twice = ordered[:, 1:][(ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)]
        if len(twice):
            raise PruneError(f'targets of shape {tuple(target.shape)} hold class {int(twice[0])} twice for one sample: '
                             f'give different classes, filled up with -1, or rows of shape {tuple(output.shape)}.')
    columns = zip(target.unbind(1), none.unbind(1)) if several else [(target, none)]
    return [torch.zeros_like(output).scatter_(1, column.masked_fill(missing, 0).unsqueeze(1),
                                              (~missing).to(output.dtype).unsqueeze(1)) for column, missing in columns]


def _among(output: torch.Tensor, classes: Sequence[int] | None) -> torch.Tensor:
    '''Return the output with minus infinity at all other classes.'''
    if classes is None:
        return output
    allowed = torch.full_like(output, -torch.inf)
    allowed[:, list(classes)] = output[:, list(classes)]
    return allowed


def checked_classes(classes: Iterable[int] | None) -> tuple[int, ...] | None:
    '''Return sorted class indices, each once, or None for all.'''
    if classes is None:
        return None
    try:
        numbers = sorted({operator.index(number) for number in classes})
    except TypeError as error:
        raise PruneError(f'classes={classes!r} is no list of class indices: give e.g. classes=(3, 5).') from error
    if not numbers or numbers[0] < 0:
        raise PruneError(f'classes={classes!r} is {"empty" if not numbers else "out of range"}: name at least one '
                         'class by its index, from 0 on, or leave it out for all.')
    return tuple(numbers)


def of_classes(target: Any, classes: Sequence[int] | None) -> torch.Tensor | None:
    '''Return which samples have a label among ``classes``; None where only the output can tell, or all are wanted.'''
    if classes is None or target is None or isinstance(target, str) or callable(target):
        return None
    target = as_labels(target)
    if target.dim() != 1 or target.is_floating_point():
        return None
    return torch.isin(target, torch.tensor(classes, device=target.device))
