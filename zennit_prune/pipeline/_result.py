'''``Result``: a pruned network with its plan, scores and history; ``evaluated``: the number that a user measures.'''
from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..errors import PruneError
from ..planning._plan import Plan
from ..relevance._relevance import Relevance
from ..util._display import finished, new_figure, table
from ..util._files import write_text
from ._choose import Choice


def evaluated(evaluate: Callable[[nn.Module], Any], network: nn.Module) -> float:
    '''Return the number that ``evaluate`` returns, the higher the better.

    Raises
    ------
    PruneError
        If it is none.
    '''
    value = evaluate(network)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise PruneError(f'evaluate returned {value!r}: return a number, the higher the better.') from error


@dataclass(frozen=True)
class Step:
    '''A network after a step of pruning, as a row of the history.

    Attributes
    ----------
    number: int
        The number of the step; 0 is the original.
    left: dict of str to float
        By unit, the share of the original's cost that is left.
    evaluation: float or None
        The number that ``evaluate`` returned for the network.
    reliability: float or None
        The split-half rank correlation of the scores that the step was planned from, over the whole network.
    seconds: float
        The duration of the step in seconds, ``evaluate`` included.

    Examples
    --------
    >>> import zennit_prune as zp
    >>> step = zp.pipeline.Step(1, {'flops': 0.61}, evaluation=0.9, reliability=0.97)
    >>> f"{step.left['flops']:.0%} of the FLOPs"
    '61% of the FLOPs'
    '''

    number: int
    left: Mapping[str, float]
    evaluation: float | None = None
    reliability: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    '''A pruned network with its plan, scores and history, as :meth:`Pruner.prune` and :meth:`Pruner.iterate` return it.

    Attributes
    ----------
    model: torch.nn.Module
        The pruned network.
    plan: Plan
        The channels that were removed from the original, in all steps together.
    relevance: Relevance
        The scores of the original network, from which the first step was planned.
    history: tuple of Step
        The original, and the network after every step.
    stopped: str
        The reason why the run ended.
    choice: Choice or None
        The criterion that ``criterion='auto'`` chose, with a table of all candidates; None where it was given.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import zennit_prune as zp
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    >>> pruner = zp.Pruner(model, None, torch.ones(1, 3, 8, 8), progress=False)
    >>> result = pruner.prune((), zp.Budget(channels=0.5), 'l1', 'none')
    >>> result.model[0].out_channels, result.stopped
    (2, 'Budget(channels=0.5) is reached.')
    >>> [step.left['channels'] for step in result.history]
    [1.0, 0.5]
    '''

    model: nn.Module
    plan: Plan
    relevance: Relevance
    history: tuple[Step, ...]
    stopped: str
    choice: Choice | None = None

    def save_history(self, path: str | os.PathLike[str]) -> None:
        '''Write the steps as JSON.

        Parameters
        ----------
        path: path-like
            The file; it appears when it is complete.

        Examples
        --------
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> pruner = zp.Pruner(model, None, example, progress=False)
        >>> result = pruner.prune((), zp.Budget(channels=0.5), 'l1', 'none')
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result.save_history(f'{folder}/history.json')
        ...     json.loads(Path(folder, 'history.json').read_text())['stopped']
        'Budget(channels=0.5) is reached.'
        '''
        steps = [asdict(step) for step in self.history]
        write_text(path, json.dumps({'stopped': self.stopped, 'history': steps}, indent=1) + '\n')

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        '''Draw the steps: the shares that are left, what ``evaluate`` returned, and the reliability of the scores.

        Parameters
        ----------
        path: path-like, optional
            An image file to write; its suffix says of which kind, e.g. ``.png`` or ``.svg``.

        Returns
        -------
        matplotlib.figure.Figure
            The figure, with a panel each for shares, evaluation and reliability as far as they are known.

        Raises
        ------
        PruneError
            If matplotlib is not installed, or the folder of ``path`` does not exist.

        Examples
        --------
        >>> pruner = zp.Pruner(model, None, example, progress=False)
        >>> result = pruner.prune((), zp.Budget(channels=0.5), 'l1', 'none')
        >>> len(result.plot().axes)
        1
        '''
        panels: list[dict[str, list[Any]]] = [
            {f'{unit} left': [step.left[unit] for step in self.history] for unit in self.history[0].left}]
        for name in ('evaluation', 'reliability'):
            values = [getattr(step, name) for step in self.history]
            panels += [{name: values}] if any(value is not None for value in values) else []
        figure = new_figure(path, (6, 1 + 2 * len(panels)))
        numbers = [step.number for step in self.history]
        every = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, lines in zip(every, panels):
            for label, values in lines.items():
                known = [(number, value) for number, value in zip(numbers, values) if value is not None]
                axes.plot(*zip(*known), marker='.', label=label)
            axes.grid(alpha=0.3)
            axes.legend()
        every[-1].set_xlabel('step')
        every[-1].locator_params('x', integer=True)
        return finished(figure, every, path)

    def __str__(self) -> str:
        units = list(self.history[0].left)
        rows = [(step.number, *(f'{step.left[unit]:.1%}' for unit in units),
                 *('' if value is None else f'{value:.4g}' for value in (step.evaluation, step.reliability)),
                 f'{step.seconds:.1f}') for step in self.history]
        return f'{table(("step", *units, "evaluation", "reliability", "seconds"), rows)}\n\n{self.stopped}'

    def __repr__(self) -> str:
        return f'Result({type(self.model).__name__}, {self.plan!r}, {len(self.history) - 1} steps: {self.stopped})'
