'''Pictures of heatmaps open, and have the colours of their values.'''

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import images

import zennit_prune as zp
from zennit_prune.looking._pictures import CHANGE, RELEVANCE, full_colour, heat, picture


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == 'PNG'
        return picture.convert('RGB')


def test_pictures_have_a_column_for_each_image_and_a_row_for_each_network(tmp_path: Path) -> None:
    sizes = {}
    for count in (1, 2, 3):
        for rows in (1, 2):
            x, maps = images(count), {f'network {row}': torch.randn(count, 8, 8) for row in range(rows)}
            zp.heatmap_image(x, maps, tmp_path / 'map.png')
            sizes[count, rows] = opened(tmp_path / 'map.png').size
    tile = sizes[2, 1][0] - sizes[1, 1][0]
    assert tile >= 128 and sizes[3, 1][0] - sizes[2, 1][0] == tile
    assert sizes[1, 2][1] - sizes[1, 1][1] == tile
    assert sizes[1, 1][1] >= 2 * 128
    assert {rows: height for (_, rows), (_, height) in sizes.items()} == {rows: sizes[1, rows][1] for rows in (1, 2)}


@pytest.mark.parametrize('shape', [(1, 3, 8, 8), (2, 1, 8, 8), (1, 3, 12, 20), (1, 3, 300, 200)])
def test_pictures_of_any_size(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    zp.heatmap_image(
        x, {'before': x.sum(1), 'after': x.abs().sum(1)}, str(tmp_path / 'map.png'), ['first', 'second'][: len(x)]
    )
    width, height = opened(tmp_path / 'map.png').size
    assert width >= shape[0] * shape[3] and height >= 3 * shape[2]


def test_signs_have_colours_and_rows_share_a_scale(tmp_path: Path) -> None:
    '''Positive relevance is red and negative blue; half of the largest is paler.'''
    half = torch.zeros(1, 8, 8)
    half[0, :4], half[0, 4:] = 1.0, -1.0
    zp.heatmap_image(torch.zeros(1, 1, 8, 8), {'full': half, 'half': half / 2}, tmp_path / 'map.png')
    pixels = np.asarray(opened(tmp_path / 'map.png')).astype(int)
    tile = pixels[:, -70]
    red, blue = (np.flatnonzero(tile[:, a] > tile[:, b] + 50) for a, b in ((0, 2), (2, 0)))
    assert len(red) > 50 and len(blue) > 50 and red[0] < blue[0]
    assert len(np.unique(tile, axis=0)) >= 5


def test_pictures_of_zeros(tmp_path: Path) -> None:
    zp.heatmap_image(torch.zeros(2, 3, 8, 8), {'nothing': torch.zeros(2, 8, 8)}, tmp_path / 'map.png')
    assert opened(tmp_path / 'map.png').size[0] >= 256


@pytest.mark.parametrize('maps', [torch.zeros(3, 8, 8), torch.zeros(2, 1, 8, 8), torch.zeros(8, 8)])
def test_heatmaps_that_do_not_fit_the_images(maps: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(zp.PruneError, match=r"'after'.*2 images"):
        zp.heatmap_image(images(2), {'after': maps}, tmp_path / 'map.png')
    assert not (tmp_path / 'map.png').exists()


@pytest.mark.parametrize(
    'arguments',
    [
        {'maps': {}},
        {'x': torch.zeros(0, 3, 8, 8), 'maps': {'a': torch.zeros(0, 8, 8)}},
        {'cmap': 'nocolours'},
        {'maps': {'a': torch.full((2, 8, 8), torch.nan)}},
        {'maps': torch.ones(2, 8, 8)},
        {'x': torch.zeros(2, 4, 8, 8)},
        {'captions': ['one']},
    ],
)
def test_pictures_of_nothing(arguments: dict[str, Any], tmp_path: Path) -> None:
    given = {'x': images(2), 'maps': {'a': torch.ones(2, 8, 8)}, **arguments}
    with pytest.raises(zp.PruneError):
        zp.heatmap_image(path=tmp_path / 'map.png', **given)
    assert not list(tmp_path.iterdir())


def test_the_path_is_the_last_argument(tmp_path: Path) -> None:
    x, maps = images(2), {'a': torch.ones(2, 8, 8)}
    with pytest.raises(zp.PruneError, match=r'the path last, call heatmap_image\(x, maps, path\)'):
        zp.heatmap_image(tmp_path / 'map.png', x, maps)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'map.png'
    path.write_bytes(b'the last one')

    def fails(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, 'replace', fails)
        zp.heatmap_image(images(2), {'a': torch.ones(2, 8, 8)}, path)
    assert [file.name for file in tmp_path.iterdir()] == ['map.png'] and path.read_bytes() == b'the last one'
    with pytest.raises(zp.PruneError, match='no folder for'):
        zp.heatmap_image(images(2), {'a': torch.ones(2, 8, 8)}, tmp_path / 'nowhere' / 'map.png')


def test_long_captions_stay_over_their_image(tmp_path: Path) -> None:
    short, long = (tmp_path / name for name in ('short.png', 'long.png'))
    maps = {'a': torch.ones(2, 8, 8)}
    zp.heatmap_image(images(2), maps, short, ['', 'second'])
    zp.heatmap_image(images(2), maps, long, ['a caption that is much wider than the image below it', 'second'])
    left, right = (np.asarray(opened(path)) for path in (short, long))
    middle = left.shape[1] - 128 - 2 * 8  # the gap between the two columns
    assert left.shape == right.shape and (left[:, middle:] == right[:, middle:]).all() and (left != right).any()


# --- pictures in a page


def decoded(uri: str) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(',')[2]))).convert('RGB')))


def test_heatmaps_have_the_colours_of_their_values() -> None:
    for colours in (RELEVANCE, CHANGE):
        shown = decoded(heat(torch.tensor([[-2.0, 0.0, 2.0, 9.0]]), 2.0, colours))
        assert shown[0].tolist() == [list(colours[0]), list(colours[1]), list(colours[2]), list(colours[2])]
    assert decoded(heat(torch.zeros(2, 2), 0.0)).unique().tolist() == [255]


def test_the_strongest_pixels_have_the_full_colour() -> None:
    values = torch.linspace(-1, 1, 10001).reshape(1, 73, 137)
    assert full_colour(values) == pytest.approx(0.99, abs=1e-3)
    spot = torch.zeros(1, 30, 30)
    spot[0, 3, 4] = -7.0
    assert full_colour(spot) == 7.0 and full_colour(torch.zeros(1, 2, 2)) == 0.0
    assert full_colour(torch.ones(1, 400, 400) * torch.tensor([1.0, 3.0]).repeat(200)) == 2.0  # reduced by averages


def test_pictures() -> None:
    bytes_ = torch.tensor([[[0, 128, 255]]], dtype=torch.uint8)
    assert decoded(picture(bytes_, True))[0, :, 0].tolist() == [0, 128, 255]
    assert decoded(picture(bytes_.double() / 255, True))[0, :, 1].tolist() == [0, 128, 255]
    assert decoded(picture(torch.tensor([[[-1.0, 0.0, 3.0]]])))[0, :, 2].tolist() == [0, 64, 255]
    large = decoded(picture(torch.rand(3, 500, 300)))
    assert max(large.shape) <= 224
