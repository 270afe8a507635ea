'''Small networks in files and folders of images, for tests of the command line.'''
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {'blue': (0, 0, 255), 'green': (0, 255, 0), 'red': (255, 0, 0)}
PREPARED = ['--size', '16', '--mean', '.5,.5,.5', '--std', '.25,.25,.25']
NETWORK = '''
import torch
from torch import nn

print('users print')


def colours():
    # sees which of the three colours is strongest: outputs blue, green, red
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        for index in (0, 3, 7):
            net[index].weight.mul_(0.05)
            net[index].bias.zero_()
        for channel in range(3):
            net[0].weight[channel, channel, 1, 1] = 1
            net[3].weight[channel, channel, 1, 1] = 1
            net[7].weight[2 - channel, channel] = 1
    return net


def redder():
    # a single logit: is there more red than blue?
    net = colours()
    one = nn.Linear(12, 1)
    with torch.no_grad():
        one.weight.copy_(net[7].weight[2:] - net[7].weight[:1])
        one.bias.zero_()
    net[7] = one
    return net


def unsuitable():
    return nn.Conv2d(3, 4, 3)


def broken():
    raise RuntimeError('no such\\ndisk')


def nothing():
    return None
'''


def network_file(folder: Path) -> Path:
    path = folder / 'nets.py'
    path.write_text(NETWORK)
    return path


def image_folder(folder: Path, names: Sequence[str] = tuple(COLOURS), each: int = 6, flat: bool = False) -> Path:
    '''Images of one colour and noise; the i-th folder has the i-th colour.'''
    noise = np.random.default_rng(0)
    for name, colour in zip(names, COLOURS.values()):
        for number in range(each):
            pixels = np.array(colour) * 0.6 + noise.normal(0, 25, (20, 24, 3)) + 60
            path = folder / f'{name}{number}.png' if flat else folder / name / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype('uint8')).save(path)
    return folder
