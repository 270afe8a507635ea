'''Folders of images for the command line: references, images to measure on, their preparation and their classes.

The output of a network that belongs to a folder of images is never guessed where the guess could be wrong.
'''
from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import InterpolationMode

from ..errors import PruneError
from ._sources import Source

RULES = ('auto', 'sorted', 'numbers', 'names', 'none')
NUMBER = re.compile(r'(\d+)(?![^\W_])')  # '7', '7_rose', '07-rose', but not '7up'
WAYS = ('--classes numbers if folders begin with the number of their output, --classes names if they are called as '
        "torchvision's classes, --classes FILE with the names of the outputs, line by line, or as JSON "
        '{"folder": number}, or --classes none to go by what the network predicts')
BATCH = 32


def class_outputs(names: Sequence[str], rule: str, outputs: int, categories: Sequence[str] = ()) -> tuple[int, ...]:
    '''Return the output of the network for every folder.

    Parameters
    ----------
    names: sequence of str
        The folders.
    rule: str
        ``'sorted'``: outputs are numbered as the sorted folders, as in training with torchvision's ``ImageFolder``;
        there are as many. ``'auto'``: as ``'sorted'``, unless numbers in names contradict. ``'numbers'``: a folder's
        name begins with its output. ``'names'``: it is that of a category. Else the path of a file: one name a line,
        in the order of the outputs, where a folder is a whole line or the first word of one; or a JSON object of
        outputs by folder.
    outputs: int
        How many outputs the network has.
    categories: sequence of str
        The names of the outputs, for ``'names'``.

    Raises
    ------
    PruneError
        If a folder has no output, or two have the same, or ``'auto'`` cannot tell.
    '''
    if rule in ('auto', 'sorted'):
        found = _in_order(names, rule, outputs)
    elif rule == 'numbers':
        found = {name: int(match[1]) for name in names if (match := NUMBER.match(name))}
    elif rule == 'names':
        if not categories:
            raise PruneError(f'--classes names needs the names of the {outputs} outputs, which are known for networks '
                             'of torchvision with its own classes: give them by --classes FILE, line by line.')
        found = _by_line(names, categories, 'the categories of torchvision')
    else:
        found = _from_file(names, Path(rule), outputs)
    return _checked(names, found, rule, outputs)


def _in_order(names: Sequence[str], rule: str, outputs: int) -> dict[str, int]:
    if len(names) != outputs:
        raise PruneError(f'there are {len(names)} folders of images, but the network has {outputs} outputs: say which '
                         f'belong together. Give {WAYS}.')
    numbers = [int(match[1]) if (match := NUMBER.match(name)) else None for name in names]
    if rule == 'auto' and None not in numbers and numbers != list(range(outputs)):
        wrong = next(place for place, number in enumerate(numbers) if number != place)
        raise PruneError(f'is folder {names[wrong]!r} output {wrong}, by the order of names, or output '
                         f'{numbers[wrong]}? Give --classes sorted, as in training with ImageFolder, or --classes '
                         'numbers.')
    return {name: number for number, name in enumerate(names)}


def _from_file(names: Sequence[str], path: Path, outputs: int) -> dict[str, int]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PruneError(f'--classes {str(path)!r} is neither a file that can be read nor one of '
                         f'{", ".join(RULES)}.') from error
    if path.suffix != '.json':
        lines = [line.strip() for line in text.splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        if len(lines) != outputs:
            raise PruneError(f'{str(path)!r} has {len(lines)} lines, but the network has {outputs} outputs: one line '
                             'each, in their order.')
        return _by_line(names, lines, repr(str(path)))
    try:
        found = json.loads(text)
    except ValueError as error:
        raise PruneError(f'{str(path)!r} is no JSON: {error}.') from error
    if not isinstance(found, dict) or not all(type(value) is int for value in found.values()):
        raise PruneError(f'{str(path)!r} does not say which output belongs to which folder: give an object like '
                         '{"daisy": 0, "rose": 3}.')
    return found


def _by_line(names: Sequence[str], lines: Sequence[str], where: str) -> dict[str, int]:
    '''Return the line of each name, which equals the whole line or its first word.'''
    found = {}
    for name in names:
        wanted = _plain(name)
        whole = [number for number, line in enumerate(lines) if _plain(line) == wanted]
        first = [number for number, line in enumerate(lines) if line and _plain(line.split()[0].rstrip(',')) == wanted]
        places = whole or first
        if len(places) > 1:
            raise PruneError(f'{name!r} is the name of outputs {", ".join(map(str, places))} in {where}: say which, by '
                             '--classes FILE.json with {"folder": number}.')
        if places:
            found[name] = places[0]
    return found


def _plain(name: str) -> str:
    return name.strip().lower().replace('_', ' ')


def _checked(names: Sequence[str], found: dict[str, int], rule: str, outputs: int) -> tuple[int, ...]:
    owner: dict[int, str] = {}
    for name in names:
        number = found.get(name)
        if number is None:
            raise PruneError(f'--classes {rule} does not say which output folder {name!r} belongs to. Give {WAYS}.')
        if not 0 <= number < outputs:
            raise PruneError(f'--classes {rule}: folder {name!r} is said to be output {number}, but the network has '
                             f'outputs 0 to {outputs - 1}.')
        if number in owner:
            raise PruneError(f'--classes {rule}: folders {owner[number]!r} and {name!r} are both said to be output '
                             f'{number}.')
        owner[number] = name
    return tuple(owner)


class Found(NamedTuple):
    '''The images of a folder.

    Attributes
    ----------
    files: tuple of str
        Sorted by sub-folder, then by path.
    labels: tuple of int
        The position of each image's sub-folder in ``names``; all 0 in a folder without.
    names: tuple of str
        The sub-folders, sorted; empty where images lie in the folder itself.
    '''

    files: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]


def find_images(folder: Path) -> Found:
    '''Find images in the sub-folders of a folder, one for each class as in ``ImageFolder``, or in the folder itself.

    Raises
    ------
    PruneError
        If there are none, or both kinds, or a sub-folder without images.
    '''
    if not folder.is_dir():
        raise PruneError(f'there is no folder of images {str(folder)!r}.')
    entries = sorted((entry for entry in os.scandir(folder) if not entry.name.startswith('.')),
                     key=lambda entry: entry.name)
    names = tuple(entry.name for entry in entries if entry.is_dir())
    loose = tuple(entry.path for entry in entries if entry.is_file() and entry.name.lower().endswith(IMG_EXTENSIONS))
    if names and loose:
        raise PruneError(f'{str(folder)!r} has images beside its sub-folders, e.g. {Path(loose[0]).name!r}: put every '
                         'image into the sub-folder of its class, or all into one folder.')
    if not names and not loose:
        raise PruneError(f'there is no image in {str(folder)!r}: files end with {", ".join(IMG_EXTENSIONS)}.')
    if not names:
        return Found(loose, (0,) * len(loose), ())
    found = make_dataset(str(folder), {name: number for number, name in enumerate(names)}, IMG_EXTENSIONS,
                         allow_empty=True)
    files, labels = zip(*found) if found else ((), ())
    empty = [name for number, name in enumerate(names) if number not in set(labels)]
    if empty:
        raise PruneError(f'there is no image in {str(folder / empty[0])!r}: every sub-folder of {str(folder)!r} is a '
                         'class, and needs images.')
    return Found(files, labels, names)


def split(found: Found, per_class: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    '''Draw references, ``per_class`` of every class, and at most ``held_out`` of the other images to measure on.

    Returns
    -------
    tuple of two lists of int
        Positions of images; the classes take turns.
    '''
    generator = torch.Generator().manual_seed(seed)
    references, rest = [], []
    for label in range(max(1, len(found.names))):
        members = [number for number, other in enumerate(found.labels) if other == label]
        drawn = [members[place] for place in torch.randperm(len(members), generator=generator, device='cpu').tolist()]
        references.append(drawn[:per_class])
        rest.append(drawn[per_class:])
    return _in_turns(references), _in_turns(rest)[:held_out]


def _in_turns(parts: Sequence[Sequence[int]]) -> list[int]:
    return [number for number in chain.from_iterable(zip_longest(*parts)) if number is not None]


@dataclass(frozen=True)
class Preparation:
    '''The way from an image to the input of a network.

    Attributes
    ----------
    resize, size: int
        The shorter side is scaled to ``resize`` pixels, then the middle ``size`` x ``size`` are cut out.
    mean, std: tuple of float
        Subtracted from, and divided by, values between 0 and 1. Three each for colours; one each for grey images.
    interpolation: InterpolationMode
        Of the scaling.
    origin: str
        Who says so.
    '''

    resize: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: InterpolationMode
    origin: str

    def __call__(self, image: Image.Image) -> torch.Tensor:
        '''Return the input that an image becomes, shape (C, size, size).'''
        prepared: torch.Tensor = transforms.Compose([
            transforms.Resize(self.resize, self.interpolation), transforms.CenterCrop(self.size),
            transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(self.mean, self.std)])(image.convert('L' if len(self.mean) == 1 else 'RGB'))
        return prepared

    def shown(self, inputs: torch.Tensor) -> torch.Tensor:
        '''Return inputs as images between 0 and 1 again.'''
        mean, std = (torch.tensor(values, device='cpu').view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (inputs.cpu() * std + mean).clamp(0, 1)

    def __str__(self) -> str:
        return (f'shorter side to {self.resize} ({self.interpolation.value}), middle {self.size} x {self.size}, mean '
                f'{_listed(self.mean)}, std {_listed(self.std)} ({self.origin})')


def preparation(source: Source, network: nn.Module, size: int | None = None, resize: int | None = None,
                mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> Preparation:
    '''Return the preparation that was asked for, completed by what torchvision or timm state for the public weights.

    Raises
    ------
    PruneError
        If something is missing, or does not fit together.
    '''
    given = {'size': size, 'mean': mean, 'std': std}
    preset = None if None not in given.values() else _preset(source, network)
    missing = [f'--{name}' for name, value in given.items() if value is None]
    if missing and preset is None:
        raise PruneError(f'the preparation of images for {source} is not known: give {", ".join(missing)} as in its '
                         'training, e.g. --size 224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225.')
    if preset is not None:
        size = preset.size if size is None else size
        resize = round(size * preset.resize / preset.size) if resize is None else resize
        mean, std = mean or preset.mean, std or preset.std
    assert size is not None and mean is not None and std is not None
    resize = size if resize is None else resize
    if len(mean) != len(std) or len(mean) not in (1, 3) or not all(value > 0 for value in std):
        raise PruneError(f'--mean {_listed(mean)} and --std {_listed(std)}: give three numbers each for colours, or '
                         'one each for grey images; those of --std are above 0.')
    if resize < size:
        raise PruneError(f'--resize {resize} is below --size {size}: the middle is cut out of the scaled image.')
    origin = 'as given' if preset is None else preset.origin if not any(given.values()) else \
        f'as given, the rest from {preset.origin}'
    return Preparation(resize, size, mean, std, InterpolationMode.BILINEAR if preset is None else preset.interpolation,
                       origin)


def _preset(source: Source, network: nn.Module) -> Preparation | None:
    '''Return the preparation that a library names for its weights; None for files.'''
    if source.kind == 'torchvision':
        from torchvision import models
        weights = models.get_model_weights(source.place)['DEFAULT']
        said = weights.transforms()
        return Preparation(said.resize_size[0], said.crop_size[0], tuple(said.mean), tuple(said.std),
                           said.interpolation, str(weights))
    if source.kind == 'timm':
        from timm.data import resolve_model_data_config  # type: ignore[attr-defined]
        config: dict[str, Any] = resolve_model_data_config(network)
        channels, size, width = config['input_size']
        if config['crop_mode'] != 'center' or size != width:
            return None
        return Preparation(int(size / config['crop_pct']), size, tuple(config['mean'])[:channels],
                           tuple(config['std'])[:channels], InterpolationMode(config['interpolation']),
                           f"timm's settings of {source.place}")
    return None


class Images(Dataset[Any]):
    '''Prepared images with their targets.

    Parameters
    ----------
    files: sequence of str
        The images.
    prepare: Preparation
        What happens to them.
    targets: sequence of int, optional
        An output of the network for each; without, an item is an image alone.
    '''

    def __init__(self, files: Sequence[str], prepare: Preparation, targets: Sequence[int] | None = None):
        self.files, self.prepare, self.targets = files, prepare, targets

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Any:
        path = self.files[number]
        try:
            with Image.open(path) as image:
                prepared = self.prepare(image)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise PruneError(f'{path!r} is no image that can be read ({error}): repair or remove it.') from error
        return prepared if self.targets is None else (prepared, self.targets[number])

    def loader(self, batch: int = BATCH) -> DataLoader[Any]:
        '''Return the images in batches, in their order.'''
        return DataLoader(self, batch)


def _listed(values: Sequence[float]) -> str:
    return ','.join(f'{value:g}' for value in values)
