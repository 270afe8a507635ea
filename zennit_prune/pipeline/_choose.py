'''Choose a criterion for a network and a budget by held-out references, without labels.'''
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import PruneError, warn
from ..planning._plan import Plan
from ..repairs._references import KEPT, References
from ..repairs._repair import repaired
from ..repairs._trial import Divergence, divergence, outputs
from ..util._display import table
from ..util._fingerprint import named
from ..util._isolation import seeded
from ..util._loaders import Batch
from ..util._networks import copied, device_of
from ._options import AnyCriterion

CANDIDATES = ('relevance', 'taylor', 'activation', 'l1')
LEAST = 8  # samples


@dataclass(frozen=True)
class Choice:
    '''The criterion that ``criterion='auto'`` chose, with the results of all candidates; it prints as a table.

    A result has it as ``result.choice``.

    Attributes
    ----------
    criterion: str or callable
        The candidate with the least squared error of the outputs; of equals, the first.
    divergences: dict of str to Divergence or str
        By candidate, the distance of the outputs of the pruned and repaired network from those of the original, on
        references that were held out (``.error``, the squared error, and ``.kl``, the Kullback-Leibler divergence of
        the predictions, which a few confident mistakes decide, so that it is a worse guide); or the reason of its
        failure.

    Examples
    --------
    >>> pruner = zp.Pruner(model, None, example, progress=False)
    >>> choice = pruner.prune(loader, zp.Budget(channels=0.5), criterion='auto', repair='bias').choice
    >>> choice.criterion in choice.divergences
    True
    '''

    criterion: AnyCriterion
    divergences: Mapping[str, Divergence | str]

    def __str__(self) -> str:
        rows = [(name, f'{found.error:.4g}', f'{found.kl:.4g}', 'chosen' * (name == named(self.criterion)))
                if isinstance(found, Divergence) else (name, '', '', found) for name, found in self.divergences.items()]
        return table(('criterion', 'squared error', 'KL', ''), rows)


def choose(model: nn.Module, loader: Iterable[Any], planned: Callable[[Iterable[Any], AnyCriterion], Plan], method: str,
           seed: int, progress: bool, criteria: Sequence[AnyCriterion] = CANDIDATES) -> Choice:
    '''Prune and repair with three quarters of the references by each criterion; compare outputs for the others.

    Parameters
    ----------
    model: torch.nn.Module
        The network.
    loader: iterable
        As for :meth:`Pruner.collect`; at most 1,024 samples are used, a uniform subset beyond that. Labels are used by
        the criteria that need them, not by the comparison.
    planned: callable
        Makes a plan from references by a criterion.
    method: str
        See :func:`zennit_prune.repair`.
    seed: int
        For the split and the loader's random choices; global random states are restored.
    progress: bool
        Show a progress bar on standard error.
    criteria: sequence of str or callable
        The candidates.

    Raises
    ------
    PruneError
        For fewer than eight references, or no candidate that works.
    '''
    with seeded(seed, device_of(model)):
        fitted, held = _split(loader, seed, model)
    reference = copied(model).eval()
    inputs = [batch.to(device_of(model)).inputs for batch in held]
    with torch.no_grad():
        wanted = outputs(reference, inputs)
    found: dict[str, Divergence | str] = {}
    for criterion in tqdm(criteria, 'choose', disable=not progress, leave=False):
        try:
            plan = planned(fitted, criterion)
            small = plan.apply(model, verify=False, progress=False)
            small = repaired(model, small, plan, fitted, method, False)
            with torch.no_grad():
                found[named(criterion)] = divergence(outputs(small.eval(), inputs), wanted)
        except PruneError as error:
            found[named(criterion)] = str(error)
    judged = {name: each.error for name, each in found.items() if isinstance(each, Divergence)}
    if not judged:
        raise PruneError(f'no criterion works: {"; ".join(f"{name}: {error}" for name, error in found.items())}')
    for name, each in found.items():
        if isinstance(each, str):
            warn(f"criterion='auto' leaves out {name!r}, which does not work here: {each}")
    best = min(judged, key=lambda name: judged[name])
    return Choice(next(criterion for criterion in criteria if named(criterion) == best), found)


def _split(loader: Iterable[Any], seed: int, model: nn.Module) -> tuple[list[Batch], list[Batch]]:
    '''Return three quarters of the samples with their targets, and the others.'''
    chunks = References(loader, KEPT, seed=seed, targets=True, network=model).chosen()
    total = sum(chunk.size for chunk in chunks)
    if total < LEAST:
        raise PruneError(f'there are {total} references: a choice is judged by some that are held out, so that it '
                         f"takes {LEAST} at least. Name a criterion, e.g. 'relevance'.")
    held = torch.zeros(total, dtype=torch.bool, device='cpu')
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed), device='cpu')
    held[order[:total // 4]] = True
    parts = list(zip(chunks, held.split([chunk.size for chunk in chunks])))
    return ([chunk.only(~mask) for chunk, mask in parts if not mask.all()],
            [chunk.only(mask) for chunk, mask in parts if mask.any()])
