'''The start of relevance: ``Origin`` says where it starts, and gives the relevance at the output for every target.'''
from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import PruneError, nearest, unknown, warn
from ..util._yielded import as_labels
from ._outputs import Output, chosen_output, class_dimension, classes_back, classes_second, ends_in_sigmoid
from ._sites import accumulation_dtype

INITIAL = ('one-hot', 'logit', 'softmax', 'contrastive', 'cross-entropy', 'binary-cross-entropy', 'value', 'weights')
SEVERAL = 4  # outputs within 0 and 1 that are hardly logits
MISTAKEN = {255: 1, -1: 0}  # numbers that mean unknown, with the class of two that is often meant by it
LOSSES = ('cross-entropy', 'binary-cross-entropy')
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
        The network's output, shape (batch, classes) or (batch, classes, ...). Where labels say so, the classes may be
        in another dimension: (batch, tokens, vocabulary) for labels of shape (batch, tokens). An output of a single
        column, shape (batch,), (batch, 1) or (batch, 1, ...), tells two classes apart by its sign, or is the value of
        a regression.
    target: torch.Tensor, callable, ``'predicted'`` or None
        One of

        - class indices, shape (batch,);
        - several per sample, shape (batch, T), -1 where a sample has fewer. Where T is the number of classes, they are
          read as rows;
        - rows of 0 and 1 of the output's shape, real or whole numbers;
        - for outputs with further dimensions, a mask of class indices, shape (batch, ...). No relevance starts where it
          is negative, or 255 if that is no class;
        - for an output of a single column, 0 and 1, real or whole numbers, of shape (batch,), (batch, 1), or a mask,
          in which pixels may be unknown as above;
        - a function of the output that returns the relevance, as Zennit's ``attr_output``.
    initial: str or callable
        The relevance at the output:

        - ``'one-hot'``: 1 at the target. For a single column, 1 at class 1 and -1 at class 0;
        - ``'logit'``: the output at the target. For a single column, the output for class 1, its negative for class 0;
        - ``'softmax'``: the gradient of the target's probability, a softmax, or a sigmoid for a single column;
        - ``'contrastive'``: 1 at the target, -1 at the strongest other class;
        - ``'cross-entropy'``: the gradient of each sample's cross-entropy, the output read as logits, averaged over the
          positions that have a target. Rows may be probabilities. For a single column, it is the binary one;
        - ``'binary-cross-entropy'``: the gradient of the sum over classes of the binary cross-entropy, for networks
          with several labels per sample; rows may be probabilities;
        - ``'value'``: the output itself, for regressions; the target is not used;
        - ``'weights'``: the target itself, real numbers of the output's shape;
        - a function of the output that returns the relevance.

    Returns
    -------
    torch.Tensor
        As the output is shaped.

    Raises
    ------
    PruneError
        If target and output do not fit, if the dimension of the classes cannot be told, or if both ``target`` and
        ``initial`` are functions.

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

    A single column, for two classes and for a regression:

    >>> output = torch.tensor([[0.5], [2.0]])
    >>> initial_relevance(output, torch.tensor([0.0, 1.0]), 'one-hot')
    tensor([[-1.],
            [ 1.]])
    >>> initial_relevance(output, None, 'value')
    tensor([[0.5000],
            [2.0000]])
    '''
    return Origin(target, initial).relevance(output)


@dataclass(frozen=True)
class Origin:
    '''Where relevance starts: an output of the network, the targets of a batch, and the relevance there.

    Parameters
    ----------
    target, initial:
        See :func:`initial_relevance`.
    output: int, str or callable, optional
        The output that relevance starts from, see :func:`zennit_prune.relevance._outputs.chosen_output`.
    classes: sequence of int, optional
        Targets of others are ignored, and predictions and rivals are chosen among these.
    inputs: object, optional
        The inputs of the network, whose shape may tell where the output has its classes.
    labels: object, optional
        The labels of the samples, where the target is ``'predicted'``; for the same purpose.
    '''

    target: Any
    initial: Initial = 'one-hot'
    output: Output = None
    classes: Sequence[int] | None = None
    inputs: Any = None
    labels: Any = None

    def chosen(self, returned: Any) -> torch.Tensor:
        '''Return the tensor that relevance starts from, of all that the network returned.'''
        return chosen_output(returned, self.output)

    def relevance(self, output: torch.Tensor) -> torch.Tensor:
        '''Return the relevance at the output, averaged over the targets of each sample.'''
        found = self.starts(output)
        relevance = torch.zeros_like(output, requires_grad=False)
        for start, share in zip(found, shares(found)):
            relevance += start.relevance(output) * share.to(output.dtype).view(-1, *[1] * (output.dim() - 1))
        return relevance

    def starts(self, output: torch.Tensor) -> list[Start]:
        '''Return one start for each of a sample's targets.'''
        middle, output = (0.5 if ends_in_sigmoid(output) else 0.0), output.detach()
        if not output.dim():
            raise PruneError('the output is a single number for the whole batch, a loss perhaps: relevance starts from '
                             'an output with a row for each sample. Name another with output=.')
        check_target(self.target, self.initial)
        function = self._function()
        if function is not None:
            if self.classes is not None and of_classes(self.target, self.classes) is None:
                raise PruneError(f'classes={tuple(self.classes)} needs a label for each sample where the initial '
                                 'relevance is a function.')
            everyone = torch.ones(output.shape[:1], dtype=torch.bool, device=output.device)
            return [Start(lambda seen: _from_function(function, seen), everyone)]
        check_initial(self.initial, self.classes)
        target = self.target if isinstance(self.target, str) else _tensor(self.target, output.device)
        if output.dim() == 1 and isinstance(target, str):
            raise PruneError(f'the output has shape {tuple(output.shape)}, without classes, so that none is predicted: '
                             "give labels that are all 0 or 1; for a regression, start at the output's value, "
                             "initial='value'; or give a function of the output as initial=.")
        dim = class_dimension(output, target, self.inputs, self.labels, callable(self.output))
        found = self._rows(classes_second(output, dim), target, dim, tuple(output.shape), middle)
        return [self._start(rows, dim, middle > 0) for rows in found]

    def predicted(self, output: torch.Tensor) -> torch.Tensor:
        '''Return the class of the largest output, for each position.

        For a single column, it is 1 from 0 on, or from 0.5 on where the column is a sigmoid. Always 0 for each sample
        where there may be no classes: where relevance starts at the value, or as a function says at a single column,
        and where the dimension of the classes cannot be told.
        '''
        middle, output = (0.5 if ends_in_sigmoid(output) else 0.0), output.detach()
        target, function = self.target if isinstance(self.target, torch.Tensor) else 'predicted', self._function()
        none = torch.zeros(len(output), dtype=torch.int64, device=output.device)
        if self.initial == 'value':
            return none
        try:
            dim = class_dimension(output, target, self.inputs, self.labels, callable(self.output))
        except PruneError:
            return none
        output = classes_second(output, dim)
        if output.shape[1] == 1 and function is not None:  # it may be a regression
            return none
        return (output[:, 0] >= middle).long() if output.shape[1] == 1 else output.argmax(1)

    def _function(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        '''Return the function from the output to all of the initial relevance, if there is one.'''
        if callable(self.target):
            return self.target
        if callable(self.initial):
            return self.initial
        return (lambda output: output) if self.initial == 'value' else None

    def _rows(self, output: torch.Tensor, target: Any, dim: int | None, shape: tuple[int, ...],
              middle: float) -> list[Rows]:
        '''Return the targets of an output whose classes are in dimension 1; ``shape`` is that of the output itself.'''
        if target is None:
            raise PruneError("there are no labels: give a loader of (inputs, labels) pairs, target='predicted', or a "
                             "function of the output as initial= (for boxes, zennit_prune.relevance.detections makes "
                             "one); for a regression, initial='value'.")
        number = 2 if output.shape[1] == 1 else output.shape[1]
        if self.classes is not None and max(self.classes) >= number:
            raise PruneError(f'class {max(self.classes)} in classes={tuple(self.classes)} is unknown: the network has '
                             f'{number} classes, 0 to {number - 1}.')
        if isinstance(target, torch.Tensor):
            target = _checked_values(target)
            if target.dim() == output.dim() and dim not in (None, 1) and target.dim() > 2:
                target = target.movedim(dim, 1)
        if self.initial == 'weights':
            return [_weights(output, target)]
        if output.shape[1] == 1:
            return [_signs(output, target, self, shape, middle)]
        return _one_hot_rows(output, target, self.initial, self.classes, shape)

    def _start(self, rows: Rows, dim: int | None, sigmoid: bool) -> Start:
        values, given = rows.values, rows.given
        one = None
        if values.dim() == 2:
            known = values.int().argmax(1) if values.shape[1] > 1 else (values[:, 0] > 0).long()
            one = torch.where((values != 0).sum(1) == 1, known, -1)

        def relevance(seen: torch.Tensor) -> torch.Tensor:
            output = classes_second(seen.detach(), dim)
            if self.initial == 'weights':
                found = values
            elif output.shape[1] == 1:
                found = _of_column(values, given, output, self.initial, sigmoid)
            else:
                found = _of_classes(values, given, output, self.initial, self.classes, sigmoid)
            return classes_back(found, dim)

        return Start(relevance, given.flatten(1).any(1), one)


class Rows(NamedTuple):
    '''A target as values shaped as the output, its classes in dimension 1, and where there is a target.

    ``values`` are 1 at the target's class and 0 elsewhere; for an output of a single column, 1 for class 1 and -1 for
    class 0. ``given`` is bool, shape (batch, 1, ...).
    '''

    values: torch.Tensor
    given: torch.Tensor


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


# --- relevance for a target
def _of_classes(rows: torch.Tensor, given: torch.Tensor, output: torch.Tensor, initial: Initial,
                classes: Sequence[int] | None, sigmoid: bool) -> torch.Tensor:
    '''Return the relevance at an output of several classes, for rows of 0 and 1.'''
    if initial == 'one-hot':
        return rows
    if initial == 'logit':
        return rows * output
    if initial == 'softmax':
        probability = output.softmax(1)
        return probability * (rows - (rows * probability).sum(1, keepdim=True))
    if initial == 'cross-entropy':
        return (output.softmax(1) * rows.sum(1, keepdim=True) - rows) / _number(given)
    if initial == 'binary-cross-entropy':
        return _binary_loss(output, rows, sigmoid) * given / _number(given)
    if len(classes or range(output.shape[1])) < 2:
        raise _no_rival()
    rivals = _among(output.masked_fill(rows != 0, -torch.inf), classes)
    rival = torch.zeros_like(output).scatter_(1, rivals.argmax(1, keepdim=True), 1.0)
    return rows - rival * rows.sum(1, keepdim=True) * (rivals.amax(1, keepdim=True) > -torch.inf)


def _of_column(signs: torch.Tensor, given: torch.Tensor, output: torch.Tensor, initial: Initial,
               sigmoid: bool) -> torch.Tensor:
    '''Return the relevance at an output of a single column, for 1 at class 1 and -1 at class 0.'''
    if initial == 'logit':
        return signs * output
    probability = output.sigmoid()
    if initial == 'softmax':
        return signs if sigmoid else signs * probability * (1 - probability)
    if initial in LOSSES:
        return _binary_loss(output, (signs + 1) / 2, sigmoid) * given / _number(given)
    return signs


def _binary_loss(output: torch.Tensor, labels: torch.Tensor, sigmoid: bool) -> torch.Tensor:
    '''Return the gradient of the binary cross-entropy at logits, or at the probabilities that a sigmoid returned.'''
    if sigmoid:
        return (output - labels) / (output * (1 - output)).clamp(min=1e-6)
    return output.sigmoid() - labels


def _number(given: torch.Tensor) -> torch.Tensor:
    '''Return the number of positions of each sample that have a target, to divide by.'''
    return given.flatten(1).sum(1).clamp(min=1).view(-1, *[1] * (given.dim() - 1))


# --- kinds of targets
def check_target(target: Any, initial: Initial = 'one-hot') -> None:
    '''Raise for a target of an unknown name, and where both target and ``initial`` are functions.'''
    if isinstance(target, str) and target != 'predicted':
        raise PruneError(f"target={target!r} is unknown: give class indices, rows, a function, or "
                         f"'predicted'{nearest(target, ['predicted']) or '.'}")
    if callable(target) and (callable(initial) or initial == 'value'):
        what = 'both target and initial are functions of the output' if callable(initial) else \
            "target is a function of the output, and initial='value' is one, too"
        raise PruneError(f'{what}: give one of them as a function; it returns all of the initial relevance.')


def check_labels(labels: torch.Tensor, classes: int) -> None:
    '''Raise unless all class indices are among those of the network.'''
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise PruneError(f'label {int(wrong[0])} is out of range: the network has {classes} classes, from 0 to '
                         f'{classes - 1}.')


def _checked_values(target: torch.Tensor) -> torch.Tensor:
    if target.is_floating_point() and not torch.isfinite(target).all():
        raise PruneError('the targets hold values that are not finite.')
    return target


def _binary(target: torch.Tensor) -> bool:
    return bool(((target == 0) | (target == 1)).all())


def _do_not_fit(target: torch.Tensor, shape: tuple[int, ...], advice: str) -> PruneError:
    return PruneError(f'targets of shape {tuple(target.shape)} and type {target.dtype} do not fit an output of shape '
                      f'{shape}: {advice}')


def _weights(output: torch.Tensor, target: Any) -> Rows:
    if not isinstance(target, torch.Tensor) or target.shape != output.shape:
        found = f'of shape {tuple(target.shape)}' if isinstance(target, torch.Tensor) else repr(target)
        raise PruneError(f"initial='weights' takes the relevance at the output as the target, of its shape "
                         f'{tuple(output.shape)}; this one is {found}.')
    values = target.to(output.dtype)
    return Rows(values, (values != 0).any(1, keepdim=True))


def _signs(output: torch.Tensor, target: Any, origin: Origin, shape: tuple[int, ...], middle: float) -> Rows:
    '''Return a target of an output of a single column: 1 at class 1, -1 at class 0, 0 where there is none.

    For the binary cross-entropy, probabilities of class 1 lie in between.
    '''
    known = torch.ones_like(output, dtype=torch.bool)
    if isinstance(target, str):
        values = torch.where(output < middle, -1.0, 1.0)
        if not middle and len(output) >= SEVERAL and bool(((output >= 0) & (output <= 1)).all()):
            warn('all outputs are within 0 and 1, so that class 1 is predicted for each, as for logits from 0 on. If '
                 'they are probabilities, give the labels, e.g. target=(output > 0.5)')
    else:
        target = _column(output, target, shape)
        if output.dim() > 2 and not target.is_floating_point() and target.dtype != torch.bool:
            known = ~unknown_pixels(target, 2)
        found = target[known]
        soft = origin.initial == 'binary-cross-entropy' and bool(((found >= 0) & (found <= 1)).all())
        if not _binary(found) and not soft:
            other = found[(found != 0) & (found != 1)][0].item()
            raise PruneError(f'the output has a single column, shape {shape}, and there is a label '
                             f"{other:.6g}. For a regression, start relevance at the output's value, initial='value'; "
                             'for two classes, give labels that are all 0 or 1; or give a function of the output as '
                             'initial=.')
        values = (2 * target.to(output.dtype) - 1) * known
    for number, sign in ((0, -1), (1, 1)):
        if origin.classes is not None and number not in origin.classes:
            known = known & (values.sign() != sign)
    return Rows(values.to(output.dtype) * known, known)


def unknown_pixels(target: torch.Tensor, classes: int) -> torch.Tensor:
    '''Return where a mask of whole numbers says that the class is unknown.'''
    return (target < 0) | ((target == UNKNOWN) & (classes <= UNKNOWN))


def labels_seen(target: Any, output: torch.Tensor) -> frozenset[int]:
    '''Return which of 0, 1 and the numbers that mean unknown occur in a mask of two classes; else nothing.'''
    if not isinstance(target, torch.Tensor) or target.is_floating_point() or target.dim() < 2 or output.dim() < 3:
        return frozenset()
    if output.shape[1] > 2 and output.shape[-1] > 2:
        return frozenset()
    return frozenset(number for number in (*MISTAKEN, *MISTAKEN.values()) if bool((target == number).any()))


def check_seen(seen: Collection[int]) -> None:
    '''Refuse masks of two classes in which, over all batches, a class has the number that means unknown.'''
    for unknown_as, other in MISTAKEN.items():
        if unknown_as in seen and other not in seen and len(seen) > 1:
            raise PruneError(f'the masks hold {unknown_as} and no {other} in all of the data, and {unknown_as} means '
                             'unknown: if it is a class, give masks of 0 and 1, e.g. loader = ((x, y > 0) for x, y in '
                             'loader).')


def _column(output: torch.Tensor, target: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    '''Return labels in the shape of an output of a single column.'''
    without = output.shape[:1] + output.shape[2:]
    alone = output.numel() == len(output) and target.shape in (output.shape[:1], output.shape[:2])  # (N, 1, 1, 1)
    if target.shape in (output.shape, without) or alone:
        return target.reshape(output.shape)
    raise _do_not_fit(target, shape, f"give labels of shape {tuple(without)}, 0 or 1, or of the output's shape; for a "
                                     "regression, initial='value'.")


def _one_hot_rows(output: torch.Tensor, target: Any, initial: Initial, classes: Sequence[int] | None,
                  shape: tuple[int, ...]) -> list[Rows]:
    '''Return rows of 0 and 1 for any target of an output of several classes; one for each target of a sample.'''
    if isinstance(target, str):
        target = _among(output, classes).argmax(1)
    as_rows = target.shape == output.shape
    if not as_rows and output[0].numel() == output.shape[1] and target.shape in (output.shape[:1], output[:, :1].shape):
        target = target.reshape(len(output), *output.shape[2:])  # (N, classes, 1, 1)
    if not as_rows and target.shape == output[:, :1].shape and output.dim() > 2:  # a mask with a dimension of channels
        target = target.squeeze(1)
    rows = [_checked_rows(output, target, initial)] if as_rows else _one_hot(target, output, shape)
    if classes is not None:
        wanted = torch.zeros(output.shape[1], dtype=output.dtype, device=output.device)
        wanted[list(classes)] = 1
        rows = [each * wanted.view(-1, *[1] * (output.dim() - 2)) for each in rows]
    if initial == 'binary-cross-entropy' and as_rows:  # a sample without labels is one, too
        return [Rows(each, torch.ones_like(each[:, :1], dtype=torch.bool)) for each in rows]
    return [Rows(each, (each != 0).any(1, keepdim=True)) for each in rows]


def _checked_rows(output: torch.Tensor, target: torch.Tensor, initial: Initial) -> torch.Tensor:
    '''Return rows of the output's shape, after a check of their values.'''
    rows, binary = target.to(output.dtype), _binary(target)
    if initial == 'cross-entropy' and binary and bool((rows.sum(1) > 1).any()):
        raise PruneError('the targets are rows with several labels for one sample, whose loss is no cross-entropy over '
                         "classes: say initial='binary-cross-entropy', or give the gradient of your loss, a function "
                         'of the output, as initial=.')
    if initial == 'cross-entropy' and bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-2).all()):
        return rows
    if binary or (initial == 'binary-cross-entropy' and bool(((rows >= 0) & (rows <= 1)).all())):
        return rows
    raise PruneError(f'the targets of shape {tuple(target.shape)} are shaped as the output and hold other values than '
                     "0 and 1. For a regression, start relevance at the output's value, initial='value'; to start it "
                     "with these weights, say initial='weights'; mark classes that are unknown by 0. Class indices of "
                     'shape (N, T), filled up with -1, are read as such where T is not the number of classes.')


def _one_hot(target: torch.Tensor, output: torch.Tensor, shape: tuple[int, ...]) -> list[torch.Tensor]:
    '''Return rows for class indices, for several of them per sample, or for a mask of them.'''
    expected = (output.shape[0], *output.shape[2:])
    several = output.dim() == 2 and target.dim() == 2 and len(target) == len(output) and target.dtype != torch.bool
    if (target.shape != expected and not several) or target.is_floating_point():
        fitting = str(expected)
        if len(shape) > 2:
            others = shape[:1] + shape[2:]
            fitting = f'{shape[:-1]} if its last dimension holds the classes, {others} if its second does'
        raise _do_not_fit(target, shape, f'give class indices, whole numbers (y.long()) of shape {fitting}; or rows of '
                                         '0 and 1 shaped as the output. Another output, or a part of it, is named by '
                                         'output=.')
    classes, target = output.shape[1], target.long()
    none = torch.zeros_like(target, dtype=torch.bool)
    if target.dim() > 1:
        none = target < 0 if several else unknown_pixels(target, classes)
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


def _tensor(target: Any, device: torch.device) -> torch.Tensor | None:
    '''Return labels as a tensor on a device; None where there are none.'''
    return None if target is None else as_labels(target).to(device)


def of_classes(target: Any, classes: Sequence[int] | None) -> torch.Tensor | None:
    '''Return which samples have a label among ``classes``; None where only the output can tell, or all are wanted.'''
    if classes is None or target is None or isinstance(target, str) or callable(target):
        return None
    target = as_labels(target)
    if target.dim() != 1 or target.is_floating_point():
        return None
    target = target.long()
    return torch.isin(target, torch.tensor(classes, device=target.device))
