'''A folder from which an interrupted run of many steps goes on.'''
from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import PruneError
from ..planning._plan import Plan
from ..relevance._relevance import Relevance
from ..repairs._trial import Divergence
from ..util._files import check_folder, read_tensors, write_tensors
from ..util._networks import unique_tensors
from ._choose import Choice
from ._result import Step

FORMAT = 'zennit_prune iteration'


class State(NamedTuple):
    '''The progress of a run: all that its next step depends on.

    The network is the original itself before the first step.
    '''

    plan: Plan
    network: nn.Module
    relevance: Relevance | None
    history: tuple[Step, ...]
    choice: Choice | None = None


def filled(small: nn.Module, values: Mapping[str, torch.Tensor]) -> nn.Module:
    '''Write other values into the parameters and buffers of a network, whose flags, hooks and types stay; return it.

    Raises
    ------
    PruneError
        If the values are not those of such a network.
    '''
    with torch.no_grad():
        for name, tensor in unique_tensors(small).items():
            if name not in values or values[name].shape != tensor.shape:
                has = f'has shape {tuple(values[name].shape)}' if name in values else 'is missing'
                raise PruneError(f'this is not the pruned network any more: {name!r} {has}, but should have shape '
                                 f'{tuple(tensor.shape)}. Change values only, not the structure.')
            tensor.copy_(values[name])
    return small


class Checkpoint:
    '''The files of a run.

    Parameters
    ----------
    folder: path-like
        The folder, which is created if needed.
    settings: mapping
        The settings that have to be equal for a run to go on, as JSON values.

    Raises
    ------
    PruneError
        If the folder cannot be made.
    '''

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]):
        self.folder, self.settings = Path(folder), dict(settings)
        check_folder(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise PruneError(f'checkpoint={os.fspath(folder)!r} is a file: name a folder, new or from the same run.')
        self.folder.mkdir(exist_ok=True)
        self.collecting = self.folder / 'collect.safetensors'
        self._relevance, self._state = self.folder / 'relevance.safetensors', self.folder / 'state.safetensors'

    def load(self, plan: Plan, model: nn.Module) -> State | None:
        '''Read the last state that :meth:`save` wrote; None where there is none.

        Parameters
        ----------
        plan: Plan
            Any plan for the network.
        model: torch.nn.Module
            The network before the first step.

        Raises
        ------
        PruneError
            If the checkpoint is of another run.
        '''
        if not self._state.exists():
            return None
        tensors, metadata = read_tensors(self._state, FORMAT)
        settings = json.loads(metadata['settings'])
        if 'floor' in settings:  # as it was called before
            settings['min_score'] = settings.pop('floor')
        for key, value in self.settings.items():
            if settings.get(key) != value:
                raise PruneError(f'{str(self.folder)!r} is the checkpoint of another run: its {key} was '
                                 f'{settings.get(key)!r}, and is {value!r} here. Ask for the same, or name a new '
                                 'folder.')
        plan = Plan.from_dict(json.loads(metadata['plan']), plan.graph, str(self._state))
        relevance = Relevance.load(self._relevance) if self._relevance.exists() else None
        history = tuple(_step(values) for values in json.loads(metadata['history']))
        network = filled(plan.graph._narrowed(model, plan.removed), tensors)
        return State(plan, network, relevance, history, _choice(json.loads(metadata.get('choice', 'null'))))

    def save(self, state: State) -> None:
        '''Write a state, which replaces the last once it is complete.'''
        if state.relevance is not None and len(state.history) == 2:  # the first step's, and no other after
            state.relevance.save(self._relevance)
        metadata = {'settings': self.settings, 'plan': state.plan.to_dict(),
                    'history': [asdict(step) for step in state.history],
                    'choice': state.choice and [state.choice.criterion, state.choice.divergences]}
        write_tensors(self._state, unique_tensors(state.network),
                      {key: json.dumps(value) for key, value in metadata.items()}, FORMAT)

    def remove(self) -> None:
        '''Remove the files, and the folder if it is empty then.'''
        for path in (self._state, self._relevance):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _step(values: dict[str, Any]) -> Step:
    '''Return a step from JSON values; in older files, the reliability has another name.'''
    if 'stability' in values:
        values['reliability'] = values.pop('stability')
    return Step(**values)


def _choice(values: Any) -> Choice | None:
    '''Return a choice from JSON values; None where nothing was chosen.'''
    if values is None:
        return None
    criterion, found = values
    return Choice(criterion, {name: value if isinstance(value, str) else Divergence(*value)
                              for name, value in found.items()})
