'''Train a pruned network further, briefly: plain PyTorch with sensible defaults.'''
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import trange

from ..errors import PruneError, unknown
from ..relevance._initial import check_labels, check_seen, labels_seen, unknown_pixels
from ..relevance._outputs import (
    Output,
    check_output,
    chosen_output,
    class_dimension,
    classes_second,
    ends_in_sigmoid,
)
from ..util._arguments import call_network
from ..util._isolation import seeded
from ..util._loaders import Batch, batches, held_out, many_times
from ..util._networks import copied, map_tensors, unique_tensors, unwrapped
from ..util._yielded import as_labels
from ._options import takes_options

WARM_UP = 0.05  # of all updates
IGNORED = -100  # a label that cross-entropy leaves out
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, float]]] = {
    'sgd': (torch.optim.SGD, {'lr': 1e-2, 'momentum': 0.9, 'weight_decay': 1e-4}),
    'adamw': (torch.optim.AdamW, {'lr': 1e-3, 'weight_decay': 1e-2}),
}
Loss = Callable[[Any, Any], torch.Tensor]


@takes_options()
@torch.inference_mode(False)
def finetune(model: nn.Module, loader: Iterable[Any], epochs: int, *, optimizer: str = 'sgd', lr: float | None = None,
             teacher: nn.Module | None = None, temperature: float = 4.0, loss: Loss | None = None,
             output: Output = None, validation: float | Iterable[Any] | None = None, patience: int = 3,
             clip: float = 1.0, seed: int = 0, callback: Callable[[dict[str, float]], object] | None = None,
             progress: bool = True) -> nn.Module:
    '''Train a copy of a network, briefly.

    SGD with momentum (or AdamW) under a cosine schedule after a short warm-up; gradients are clipped; mixed precision
    where the network is on a GPU. Frozen parameters stay, and so does BatchNorm whose parameters are all frozen. With
    ``validation``, the epoch that did best there is returned, which may be the start: it never gets worse there.

    Parameters
    ----------
    model: torch.nn.Module
        The network; it is not touched.
    loader: iterable
        Yields (inputs, labels) batches; or a pair of tensors, which is shuffled. A generator is held in memory.
    epochs: int
        The largest number of passes through the loader.
    optimizer: str
        ``'sgd'`` or ``'adamw'``.
    lr: float, optional
        The largest learning rate; 0.01 for SGD and 0.001 for AdamW.
    teacher: torch.nn.Module, optional
        Usually the unpruned network: learn its outputs in place of the labels, which may be missing; probabilities of
        classes, or values where there is one output only.
    temperature: float
        The number that outputs are divided by before they are compared with the teacher's.
    loss: callable, optional
        From outputs and labels (or the teacher's outputs) to a number, in place of the cross-entropy, which is the
        binary one for an output of a single column and for rows with several labels. Without ``output``, it is called
        with all that the network returns.
    output: int, str or callable, optional
        The output that is trained, where the network returns several tensors: an index, a key or attribute, or a
        function of what it returns. By default, the one that is called ``'logits'`` or ``'out'``, or the only one.
    validation: float or iterable, optional
        A loader to validate on after every epoch, or the share of ``loader`` to hold out for that: samples of tensors
        and of a ``DataLoader``, whole batches of others.
    patience: int
        Stop after so many epochs that were not better there.
    clip: float
        The largest norm of the gradients of all parameters together; longer ones are scaled down.
    seed: int
        The seed of shuffling, dropout and the held-out share; global random states are restored.
    callback: callable, optional
        Called after every epoch with its ``'epoch'``, ``'loss'``, and ``'validation'`` loss if there is one.
    progress: bool
        Show a progress bar on standard error.

    Returns
    -------
    torch.nn.Module
        A new network, in evaluation mode.

    Raises
    ------
    PruneError
        For an option that is not known, arguments out of range, labels that are missing, a network without trainable
        parameters, or a loss that is not finite.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import zennit_prune as zp
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    >>> losses = []
    >>> trained = zp.finetune(model, (torch.ones(8, 3, 2, 2), torch.zeros(8, dtype=torch.int64)), 3, progress=False,
    ...                       callback=lambda epoch: losses.append(epoch['loss']))
    >>> len(losses), losses[0] > losses[-1]
    (3, True)
    '''
    if optimizer not in OPTIMIZERS:
        raise unknown('optimizer', optimizer, OPTIMIZERS)
    check_output(output)
    for name, count in (('epochs', epochs), ('patience', patience)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise PruneError(f'{name}={count!r}: give a whole number of epochs from 1 on.')
    for name, value in (('temperature', temperature), ('clip', clip), *([] if lr is None else [('lr', lr)])):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise PruneError(f'{name}={value!r}: give a number above 0.')
    network = copied(unwrapped(model)).eval()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        raise PruneError('the network has no trainable parameter: set requires_grad of those that are to learn.')
    with seeded(seed, parameters[0].device), torch.enable_grad():
        train, unseen = many_times(loader), None
        if isinstance(validation, (int, float)):
            train, unseen = held_out(train, validation)
        elif validation is not None:
            unseen = many_times(validation)
        kind, defaults = OPTIMIZERS[optimizer]
        steps = kind(parameters, **{**defaults, **({} if lr is None else {'lr': lr})})
        schedule = torch.optim.lr_scheduler.LambdaLR(steps, _Cosine(epochs * _count(train)))
        objective = _Objective(network, teacher, temperature, loss, output)
        best, since, kept = (None if unseen is None else objective.mean(unseen)), 0, _values(network)
        for epoch in trange(epochs, desc='fine-tuning', leave=False, disable=not progress):
            said = {'epoch': epoch + 1, 'loss': objective.epoch(train, steps, schedule, clip)}
            if best is not None and unseen is not None:
                said['validation'] = objective.mean(unseen)
                since += 1
                if said['validation'] < best:
                    best, since, kept = said['validation'], 0, _values(network)
            if callback is not None:
                callback(said)
            if since >= patience:
                break
    with torch.no_grad():
        for name, tensor in unique_tensors(network).items() if best is not None else ():
            tensor.copy_(kept[name])
    network.zero_grad()
    return network


class _Objective:
    '''The loss of a network on a batch, and an update that lowers it.'''

    def __init__(self, network: nn.Module, teacher: nn.Module | None, temperature: float, loss: Loss | None,
                 output: Output = None):
        self.network, self.temperature, self.loss, self.output = network, temperature, loss, output
        self.seen: frozenset[int] = frozenset()
        device = self.device = next(network.parameters()).device
        self.teacher = None if teacher is None else copied(unwrapped(teacher)).eval().requires_grad_(False).to(device)
        mixed = device.type == 'cuda' and all(parameter.dtype == torch.float32 for parameter in network.parameters())
        dtype = torch.float16 if mixed and not torch.cuda.is_bf16_supported() else torch.bfloat16
        self.mixed = torch.autocast(device.type, dtype, mixed)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def __call__(self, batch: Batch) -> torch.Tensor:
        inputs, labels = batch.to(self.device)
        with self.mixed:
            output = self._chosen(call_network(self.network, inputs))
            if self.teacher is not None:
                with torch.no_grad():
                    labels = self._chosen(call_network(self.teacher, inputs))
        if labels is None:
            raise PruneError('there are no labels to learn: give (inputs, labels) batches, or teacher=, the unpruned '
                             'network.')
        output = map_tensors(_in_single, output)
        if isinstance(output, torch.Tensor):
            self.seen |= labels_seen(labels, output)
        if self.loss is not None:
            return self.loss(output, labels)
        if self.teacher is None:
            return _cross_entropy(output, labels, inputs, callable(self.output))
        if output.dim() < 2 or output.shape[1] == 1:  # no classes, whose probabilities could be compared
            return F.mse_loss(output, labels.to(output.dtype))
        soft, wanted = ((values / self.temperature).log_softmax(1) for values in (output, labels.to(output.dtype)))
        divergence = F.kl_div(soft, wanted, reduction='none', log_target=True).sum(1).mean()
        return divergence * self.temperature ** 2  # so that gradients do not depend on the temperature

    def _chosen(self, returned: Any) -> Any:
        '''Return the output that counts; all that the network returns, for a loss of the user's without ``output``.'''
        if self.loss is not None and self.output is None:
            return returned
        return chosen_output(returned, self.output)

    def epoch(self, loader: Iterable[Any], optimizer: torch.optim.Optimizer,
              schedule: torch.optim.lr_scheduler.LRScheduler, clip: float) -> float:
        '''Train on all batches; the mean loss over samples, each before its update.'''
        total, samples = 0.0, 0
        for batch in batches(loader, network=self.network):
            size = batch.size
            self._set_training(size)
            value = self(batch)
            if not torch.isfinite(value):
                raise PruneError(f'the loss is {value.item()}: training diverged, or the data are not finite. Lower '
                                 f'lr, now {optimizer.param_groups[0]["lr"]:.3g}, or check the data.')
            optimizer.zero_grad()
            self.scaler.scale(value).backward()
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]['params'], clip)
            self.scaler.step(optimizer)
            self.scaler.update()
            schedule.step()
            total, samples = total + value.item() * size, samples + size
        self.network.eval()
        check_seen(self.seen if self.loss is None and self.teacher is None else ())
        return self._per_sample(total, samples)

    def _set_training(self, size: int) -> None:
        '''Put the network into training mode, but for frozen BatchNorm, and for all of it at a single sample.'''
        self.network.train()
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                own = list(module.parameters())
                module.train(size > 1 and (not own or any(parameter.requires_grad for parameter in own)))

    def mean(self, loader: Iterable[Any]) -> float:
        '''Return the mean loss over samples.'''
        total, samples = 0.0, 0
        with torch.enable_grad():  # the graph says whether the network ends in a sigmoid
            for batch in batches(loader, network=self.network):
                total += float(self(batch)) * batch.size
                samples += batch.size
        return self._per_sample(total, samples)

    @staticmethod
    def _per_sample(total: float, samples: int) -> float:
        if not samples:
            raise PruneError('there is nothing to train or to validate on: the loader is empty. Every epoch reads it '
                             'anew.')
        return total / samples


def _in_single(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _cross_entropy(output: torch.Tensor, labels: Any, inputs: Any, given: bool) -> torch.Tensor:
    '''Return the cross-entropy for class indices or rows; the binary one for an output of one column.'''
    labels = as_labels(labels).to(output.device)
    scores = classes_second(output, class_dimension(output, labels, inputs, given=given))
    if scores.shape[1] == 1:
        return _of_column(output, scores, labels)
    if labels.shape == scores.shape:
        return _of_rows(scores, labels)
    if labels.shape in (scores[:, :1].shape, (*scores[:, :1].shape, 1)) and not labels.is_floating_point():
        labels = labels.reshape(len(scores), *scores.shape[2:])
    if not labels.is_floating_point():
        labels = labels.long()
        if labels.dim() > 1:
            labels = labels.masked_fill(unknown_pixels(labels, scores.shape[1]), IGNORED)
        check_labels(labels[labels != IGNORED], scores.shape[1])
    return F.cross_entropy(scores, labels)


def _of_column(output: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    '''Return the binary cross-entropy of a single column, of logits or of the probabilities of a sigmoid.'''
    if labels.numel() != scores.numel() or not ((labels == 0) | (labels == 1)).all():
        raise PruneError(f'the output has shape {tuple(output.shape)}, without classes: give loss=, a function of '
                         'outputs and labels, or labels that are all 0 or 1.')
    loss = F.binary_cross_entropy if ends_in_sigmoid(output) else F.binary_cross_entropy_with_logits
    return loss(scores, labels.reshape(scores.shape).to(scores.dtype))


def _of_rows(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    '''Return the loss of rows: the cross-entropy of one class or of probabilities, the binary one of several labels.'''
    rows = rows.to(scores.dtype)
    if bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-2).all()):
        return F.cross_entropy(scores, rows)
    if bool(((rows == 0) | (rows == 1)).all()):
        return F.binary_cross_entropy_with_logits(scores, rows)
    raise PruneError(f'the labels of shape {tuple(rows.shape)} are shaped as the output and are neither 0 and 1 nor '
                     'probabilities: for a regression, say, give loss=, a function of outputs and labels, e.g. '
                     'torch.nn.functional.mse_loss.')


class _Cosine:
    '''The factor of the learning rate at each update: up in a straight line, then down along a cosine.'''

    def __init__(self, updates: int):
        self.updates, self.warm_up = updates, max(1, round(WARM_UP * updates))

    def __call__(self, update: int) -> float:
        if update < self.warm_up:
            return (update + 1) / (self.warm_up + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (update - self.warm_up) / max(1, self.updates - self.warm_up))))


def _values(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in unique_tensors(network).items()}


def _count(loader: Iterable[Any]) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in loader)
