'''The request of a command line, with all that is known before anything is computed, and composites by name.'''
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zennit.composites import COMPOSITES
from zennit.core import Composite

from ..errors import PruneError
from ..pipeline._presets import zplus
from ..pipeline._pruner import Pruner
from ..planning._cost import Budget
from ..planning._plan import Plan
from ..relevance._attribute import recommended_composite
from ..relevance._outputs import chosen_output
from ..util._display import some
from ._images import Images, class_outputs, find_images, preparation, split
from ._sources import Source, build, categories, load_weights, weights_url

OWN = {'recommended': recommended_composite, 'zplus': zplus}
NAMES = (*OWN, *COMPOSITES)
PER_CLASS = 10
WITHOUT_CLASSES = 100
LISTED = 20  # folders in the line about classes; --json has all


def composite_by_name(name: str, mean: Sequence[float], std: Sequence[float]) -> Composite:
    '''Return a composite of Zennit's registry, ``'recommended'`` (epsilon) or ``'zplus'``.

    Parameters
    ----------
    name: str
        One of ``NAMES``.
    mean, std: sequence of float
        How images are normalised, each channel from [0, 1]: the bounds of composites with a ZBox are those of black
        and white.

    Returns
    -------
    zennit.core.Composite
    '''
    if name in OWN:
        return OWN[name]()
    low, high = (torch.tensor([(value - m) / s for m, s in zip(mean, std)], device='cpu').view(1, -1, 1, 1)
                 for value in (0, 1))  # Zennit moves them to what they bound
    bounds = {'low': low, 'high': high}
    make = COMPOSITES[name]
    needed = inspect.signature(make).parameters
    return make(**{key: value for key, value in bounds.items() if key in needed})


@dataclass(frozen=True)
class Options:
    '''The options of a command line; see ``zennit-prune run --help``. Either ``budget`` or ``plan`` is given.'''

    model: Source
    images: Path
    out: Path
    budget: Budget | None = None
    plan: Path | None = None
    weights: Path | None = None
    outputs: int | None = None
    size: int | None = None
    resize: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: str = 'auto'
    per_class: int | None = None
    references: int | None = None
    held_out: int = 1000
    composite: str = 'recommended'
    criterion: str = 'relevance'
    repair: str = 'refit'
    ignore: Sequence[str] = ()
    round_to: int | None = None
    seed: int = 0
    device: str = 'cpu'
    batch: int = 32
    report: bool = True
    force: bool = False
    progress: bool = False
    command: str = ''


@dataclass
class Job:
    '''A network, its images, and the work that is to be done with them.

    Parameters
    ----------
    options: Options
        The options that were given.
    say: callable
        Shows a line of progress.

    Attributes
    ----------
    network: torch.nn.Module
        The network with its weights, on its device.
    prepare: Preparation
        From images to inputs.
    found, drawn, rest:
        All images, and the positions of the references and of the images to measure on.
    mapping: dict of str to int, or None
        The output of every folder.
    class_names: list of str or None
        The names of the outputs.
    pruner: Pruner
        The traced network.
    given_plan: Plan or None
        The plan that was given.
    facts: dict
        All this as JSON values.

    Raises
    ------
    PruneError
        If anything is missing or does not fit.
    '''

    options: Options
    say: Callable[[str], object]
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = self.options
        self.device = _device(options.device)
        self.network, weights = self._network()
        self.prepare = preparation(options.model, self.network, options.size, options.resize, options.mean, options.std)
        self.say(f'images: {self.prepare}')
        self._draw()
        example = self.images(self.drawn[:1], labelled=False)[0].unsqueeze(0).to(self.device)
        self._name_classes(example)
        composite = composite_by_name(options.composite, self.prepare.mean, self.prepare.std)
        self.pruner = Pruner(self.network, composite, example, options.ignore, progress=options.progress)
        groups = self.pruner.graph.groups
        self.say(f'{sum(group.size for group in groups):,} removable channels in {len(groups)} groups')
        self.given_plan = None if options.plan is None else _plan(options.plan, self.pruner)
        self.facts |= {
            'model': str(options.model), 'weights': weights, 'images': str(options.images),
            'preparation': str(self.prepare), 'classes': self.mapping, 'references': len(self.drawn),
            'measured_on': len(self.rest), 'composite': options.composite, 'criterion': options.criterion,
            'budget': None if options.budget is None else {options.budget.name: options.budget.value},
            'plan': None if options.plan is None else str(options.plan), 'ignore': list(options.ignore),
            'seed': options.seed, 'device': str(self.device)}

    def _network(self) -> tuple[nn.Module, str]:
        '''Return the network, and the place where its weights are from.'''
        options = self.options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            network = build(options.model, options.outputs)
        weights = f'those of {options.model}'
        if options.weights is not None:
            for note in load_weights(network, options.weights):
                self.say(note)
            weights = str(options.weights)
        elif options.model.kind != 'file':
            weights, url = 'random', weights_url(options.model)
            self.say('Warning: the weights are random, and so is what follows: give trained ones by --weights FILE'
                     + (f', e.g. from {url}.' if url else '.'))
        self.say(f'network: {options.model}, weights: {weights}')
        return network.to(self.device), weights

    def _draw(self) -> None:
        '''Choose references, and images to measure on.'''
        options = self.options
        self.found = find_images(options.images)
        names, folder = self.found.names, str(options.images)
        if names and options.references is not None:
            raise PruneError(f'--references {options.references} is for a folder of images without classes; '
                             f'{folder!r} has {len(names)} of them: give --per-class.')
        if not names and options.per_class is not None:
            raise PruneError(f'--per-class {options.per_class} needs a sub-folder for every class; {folder!r} has '
                             'none: give --references.')
        each = options.per_class or PER_CLASS if names else options.references or WITHOUT_CLASSES
        self.drawn, self.rest = split(self.found, each, options.held_out, options.seed)
        self.say(f'{len(self.drawn)} references{f" of {len(names)} classes" if names else ""}, {len(self.rest)} other '
                 'images to measure on')
        if options.held_out and not self.rest:
            self.say('Warning: no image is left to measure on: give more images, or ask for fewer references.')

    def _name_classes(self, example: torch.Tensor) -> None:
        '''Decide which output belongs to which folder, and say so.'''
        with torch.no_grad():
            try:
                returned = self.network(example)
            except Exception as error:
                raise PruneError(f'the network does not run with an image of shape {tuple(example.shape)}: '
                                 f'{type(error).__name__}: {error}') from error
        output = chosen_output(returned)
        if output.dim() > 2:
            raise PruneError(f'the network returns shape {tuple(output.shape)} for one image: the command line is for '
                             'classifiers, (N, classes); use the Python interface for others.')
        outputs = output.shape[1] if output[0].numel() > 1 else 2  # one column tells two classes apart by its sign
        names, rule = self.found.names, self.options.classes
        known = categories(self.options.model, outputs)
        self.mapping: dict[str, int] | None = None
        if names and rule != 'none':
            self.mapping = dict(zip(names, class_outputs(names, rule, outputs, known)))
            self.say('classes: ' + some([f'{name} = output {number}' for name, number in self.mapping.items()], LISTED))
        elif rule not in ('auto', 'none'):
            raise PruneError(f'--classes {rule} needs a sub-folder for every class; {str(self.options.images)!r} has '
                             'none.')
        else:
            self.say('classes: none; relevance starts at what the network predicts')
        called = {**dict(enumerate(known)), **{number: name for name, number in (self.mapping or {}).items()}}
        self.class_names = [called.get(number, str(number)) for number in range(outputs)] if called else None

    def images(self, chosen: Sequence[int], labelled: bool = True) -> Images:
        '''Return the images at some positions, with their outputs where these are known.'''
        files, names = [self.found.files[number] for number in chosen], self.found.names
        mapping: Mapping[str, int] | None = self.mapping if labelled else None
        targets = None if mapping is None else [mapping[names[self.found.labels[number]]] for number in chosen]
        return Images(files, self.prepare, targets)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:
        raise PruneError(f'--device {name} cannot be used here: {str(error).splitlines()[0]}') from error
    return device


def _plan(path: Path, pruner: Pruner) -> Plan:
    if not path.is_file():
        raise PruneError(f'there is no plan {str(path)!r}: zennit-prune inspect writes one.')
    plan = Plan.load(path, pruner.graph)
    if not plan.removed:
        raise PruneError(f'the plan {str(path)!r} removes no channel.')
    return plan
