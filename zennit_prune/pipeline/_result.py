'''``Result``: a pruned network, with how it came about.

What a user's function says of a network.
'''
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
from ..util._display import table
from ..util._files import check_folder, write_text
from ..util._plots import needed


def evaluated(evaluate: Callable[[nn.Module], Any], network: nn.Module) -> float:
    '''The number that ``evaluate`` returns, the higher the better.

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
    '''A network on the way.

    Attributes
    ----------
    number: int
        0 for the original.
    left: dict of str to float
        By unit, the share of the original's cost that is left.
    evaluation: float or None
        What ``evaluate`` returned for the network.
    stability: float or None
        The split-half rank correlation of the scores that the step was planned from, over the whole network.
    seconds: float
        What the step took, ``evaluate`` included.
    '''

    number: int
    left: Mapping[str, float]
    evaluation: float | None = None
    stability: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    '''What :meth:`Pruner.prune` and :meth:`Pruner.iterate` return; print it.

    Attributes
    ----------
    model: torch.nn.Module
        The pruned network.
    plan: Plan
        What was removed of the original, in all steps together.
    relevance: Relevance
        The scores of the original network, which the first step was planned from.
    history: tuple of Step
        The original, and the network after every step.
    stopped: str
        Why it ended.
    '''

    model: nn.Module
    plan: Plan
    relevance: Relevance
    history: tuple[Step, ...]
    stopped: str

    def save_history(self, path: str | os.PathLike[str]) -> None:
        '''Write the steps as JSON.'''
        steps = [asdict(step) for step in self.history]
        write_text(path, json.dumps({'stopped': self.stopped, 'history': steps}, indent=1) + '\n')

    def plot(self, path: str | os.PathLike[str]) -> None:
        '''Draw the steps: what is left of the network, what ``evaluate`` returned, and how stable the ranking was.

        Parameters
        ----------
        path: path-like
            An image; its ending says of which kind.

        Raises
        ------
        PruneError
            If matplotlib is not installed.
        '''
        Figure = needed('matplotlib.figure', 'plot', 'plot()').Figure
        check_folder(path)
        panels: list[dict[str, list[Any]]] = [
            {f'{unit} left': [step.left[unit] for step in self.history] for unit in self.history[0].left}]
        for name in ('evaluation', 'stability'):
            values = [getattr(step, name) for step in self.history]
            panels += [{name: values}] if any(value is not None for value in values) else []
        figure = Figure((6, 1 + 2 * len(panels)), layout='constrained')
        numbers = [step.number for step in self.history]
        for axes, lines in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels):
            for label, values in lines.items():
                known = [(number, value) for number, value in zip(numbers, values) if value is not None]
                axes.plot(*zip(*known), marker='.', label=label)
            axes.grid(alpha=0.3)
            axes.legend()
        axes.set_xlabel('step')
        axes.locator_params('x', integer=True)
        figure.savefig(path)

    def __str__(self) -> str:
        units = list(self.history[0].left)
        rows = [(step.number, *(f'{step.left[unit]:.1%}' for unit in units),
                 *('' if value is None else f'{value:.4g}' for value in (step.evaluation, step.stability)),
                 f'{step.seconds:.1f}') for step in self.history]
        return f'{table(("step", *units, "evaluation", "stability", "seconds"), rows)}\n\n{self.stopped}'

    def __repr__(self) -> str:
        return f'Result({type(self.model).__name__}, {self.plan!r}, {len(self.history) - 1} steps: {self.stopped})'
