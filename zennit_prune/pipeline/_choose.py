'''``choose``: which criterion suits a network and a budget, judged without labels on references that were held out.'''
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..errors import PruneError
from ..planning._cost import Budget
from ..repairs._references import KEPT, References
from ..repairs._repair import METHODS, repaired
from ..repairs._trial import Divergence, divergence, outputs
from ..util._display import table
from ..util._fingerprint import named
from ..util._isolation import seeded
from ..util._loaders import as_loader, batch_size, batches, only
from ..util._networks import copied, device_of, map_tensors

if TYPE_CHECKING:
    from ._pruner import Criterion, Pruner

CANDIDATES = ('relevance', 'taylor', 'activation', 'l1')
LEAST = 8  # samples


@dataclass(frozen=True)
class Choice:
    '''What :func:`choose` returns; print it.

    Attributes
    ----------
    criterion: str or callable
        The best of the candidates.
    divergences: dict of str to Divergence or str
        By candidate, how far the outputs of the pruned and repaired network are from those of the original, on
        references that were held out; or why it failed.
    '''

    criterion: Criterion
    divergences: Mapping[str, Divergence | str]

    def __str__(self) -> str:
        rows = [(name, f'{found.error:.4g}', f'{found.kl:.4g}', 'chosen' * (name == named(self.criterion)))
                if isinstance(found, Divergence) else (name, '', '', found) for name, found in self.divergences.items()]
        return table(('criterion', 'squared error', 'KL', ''), rows)


def choose(pruner: Pruner, loader: Iterable[Any], budget: Budget, criteria: Sequence[Criterion] = CANDIDATES,
           method: str = 'refit', seed: int = 0, progress: bool = True, *, collect: Mapping[str, Any] | None = None,
           plan: Mapping[str, Any] | None = None) -> Choice:
    '''Prune and repair with three quarters of the references by each criterion; compare outputs on the others.

    Parameters
    ----------
    pruner: Pruner
        The network.
    loader: iterable
        As for :meth:`Pruner.collect`; of more than 1,024 samples, a random choice is used. Labels are used by the
        criteria that need them, not by the comparison.
    budget: Budget
        What is to be left.
    criteria: sequence of str or callable
        See :meth:`Pruner.collect`. Of equals, the first is chosen.
    method: str
        See :func:`zennit_prune.repair`.
    seed: int
        For the split, the criteria and the loader's random choices; global random states are restored.
    progress: bool
        Show a progress bar on standard error.
    collect, plan: mapping
        Further options of :meth:`Pruner.collect` and :meth:`Pruner.plan`.

    Returns
    -------
    Choice
        The criterion with the least squared error of the outputs. The Kullback-Leibler divergence of the predictions
        is told, too; a few samples with confident mistakes decide it, so that it is a worse guide.

    Raises
    ------
    PruneError
        For fewer than eight references, no candidate, or none that works.
    '''
    if isinstance(criteria, str) or not criteria:
        raise PruneError(f'criteria={criteria!r}: give a list of at least one.')
    if method not in METHODS:
        raise PruneError(f'method={method!r} is unknown: use one of {", ".join(map(repr, METHODS))}.')
    with seeded(seed, device_of(pruner.model)):
        fitted, held = _split(loader, seed)
    model = copied(pruner.model).eval()
    held = [map_tensors(lambda tensor: tensor.to(device_of(model)), inputs) for inputs, _ in held]
    with torch.no_grad():
        wanted = outputs(model, held)
    found: dict[str, Divergence | str] = {}
    for criterion in tqdm(criteria, 'choose', disable=not progress, leave=False):
        try:
            relevance = pruner.collect(fitted, criterion, **{'seed': seed, 'progress': False, **(collect or {})})
            chosen = pruner.plan(relevance, budget, **{'progress': False, **(plan or {})})
            small = chosen.apply(pruner.model, verify=False, progress=False)
            small = repaired(small, pruner.model, chosen, fitted, method, False)
            with torch.no_grad():
                found[named(criterion)] = divergence(outputs(small.eval(), held), wanted)
        except PruneError as error:
            found[named(criterion)] = str(error)
    judged = {name: each.error for name, each in found.items() if isinstance(each, Divergence)}
    if not judged:
        raise PruneError(f'no criterion works: {"; ".join(f"{name}: {error}" for name, error in found.items())}')
    best = min(judged, key=lambda name: judged[name])
    return Choice(next(criterion for criterion in criteria if named(criterion) == best), found)


def _split(loader: Iterable[Any], seed: int) -> tuple[list[Any], list[Any]]:
    '''Three quarters of the samples with their targets, and the others.'''
    references = References((((inputs, _tensor(target)), None) for inputs, target in batches(as_loader(loader))), KEPT,
                            seed=seed)
    chunks = references.chosen()
    sizes = [batch_size(chunk) for chunk in chunks]
    if sum(sizes) < LEAST:
        raise PruneError(f'there are {sum(sizes)} references: a choice is judged by some that are held out, so that it '
                         f"takes {LEAST} at least. Name a criterion, e.g. 'relevance'.")
    held = torch.zeros(sum(sizes), dtype=torch.bool, device='cpu')
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed), device='cpu')
    held[order[:len(held) // 4]] = True
    parts = list(zip(chunks, sizes, held.split(sizes)))
    return ([only(chunk, size, ~mask) for chunk, size, mask in parts if not mask.all()],
            [only(chunk, size, mask) for chunk, size, mask in parts if mask.any()])


def _tensor(target: Any) -> Any:
    '''Labels in a list as a tensor, which can be indexed.'''
    return torch.as_tensor(target, device='cpu') if isinstance(target, (list, tuple)) else target
