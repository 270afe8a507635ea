'''Folders of images: which are drawn, how they are prepared, and which output they belong to.'''
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import images as made
import pytest
import torch
import torchvision
from PIL import Image
from zennit.composites import EpsilonGammaBox

import zennit_prune as zp
from zennit_prune.cli._images import Images, Preparation, class_outputs, find_images, preparation, split
from zennit_prune.cli._jobs import NAMES, composite_by_name
from zennit_prune.cli._sources import Source, build


def test_finds_what_image_folder_finds(tmp_path: Path) -> None:
    made.image_folder(tmp_path, each=2)
    (tmp_path / '.hidden').mkdir()
    (tmp_path / 'notes.txt').write_text('')
    (tmp_path / 'red' / 'deeper').mkdir()
    (tmp_path / 'red' / '0.png').rename(tmp_path / 'red' / 'deeper' / '0.PNG')
    found = find_images(tmp_path)
    (tmp_path / '.hidden').rmdir()
    expected = torchvision.datasets.ImageFolder(tmp_path)
    assert list(zip(found.files, found.labels)) == expected.samples and list(found.names) == expected.classes
    flat = find_images(made.image_folder(tmp_path / 'flat', each=2, flat=True))
    assert len(flat.files) == 6 and flat.names == () and set(flat.labels) == {0}


def test_folders_that_say_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(zp.PruneError, match='there is no folder'):
        find_images(tmp_path / 'absent')
    with pytest.raises(zp.PruneError, match='there is no image in'):
        find_images(tmp_path)
    made.image_folder(tmp_path, each=1)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(zp.PruneError, match=r"no image in '.*empty'"):
        find_images(tmp_path)
    (tmp_path / 'empty').rmdir()
    Image.new('RGB', (4, 4)).save(tmp_path / 'loose.jpg')
    with pytest.raises(zp.PruneError, match=r"images beside its sub-folders, e\.g\. 'loose\.jpg'"):
        find_images(tmp_path)


def test_references_and_the_rest_are_apart_and_balanced(tmp_path: Path) -> None:
    found = find_images(made.image_folder(tmp_path, each=6))
    drawn, rest = split(found, 4, 1000, 0)
    assert sorted(drawn + rest) == list(range(18))
    assert [found.labels[number] for number in drawn] == [0, 1, 2] * 4
    assert split(found, 4, 1000, 0) == (drawn, rest) != split(found, 4, 1000, 1)
    assert split(found, 4, 3, 0)[1] == rest[:3] and sorted(found.labels[number] for number in rest[:3]) == [0, 1, 2]
    assert split(found, 9, 1000, 0)[1] == []


@pytest.mark.parametrize('name', ['torchvision:resnet18', 'torchvision:efficientnet_b0', 'torchvision:inception_v3'])
def test_prepares_as_the_preset_of_torchvision(name: str) -> None:
    source = Source.parse(name)
    preset = torchvision.models.get_model_weights(source.place)['DEFAULT'].transforms()
    pixels = torch.randint(256, (40, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    assert torch.equal(preparation(source, torch.nn.Identity())(image), preset(image))


def test_prepares_as_timm() -> None:
    timm = pytest.importorskip('timm')
    source = Source.parse('timm:resnet18')
    network = build(source)
    made_by_timm = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    pixels = torch.randint(256, (40, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    torch.testing.assert_close(preparation(source, network)(image), made_by_timm(image))


def prepared(**options: Any) -> Preparation:
    return preparation(Source.parse('net.py:f'), torch.nn.Identity(), **options)


def test_preparation_is_explicit() -> None:
    with pytest.raises(zp.PruneError, match=r'the preparation of images for net.py:f is not known: give --mean, --std'):
        prepared(size=8)
    with pytest.raises(zp.PruneError, match='three numbers each'):
        prepared(size=8, mean=(0., 0.), std=(1., 1.))
    with pytest.raises(zp.PruneError, match='above 0'):
        prepared(size=8, mean=(0.,), std=(0.,))
    with pytest.raises(zp.PruneError, match='--resize 4 is below --size 8'):
        prepared(size=8, resize=4, mean=(0.,), std=(1.,))
    larger = preparation(Source.parse('torchvision:resnet18'), torch.nn.Identity(), size=112)
    assert (larger.size, larger.resize, larger.mean) == (112, 128, (0.485, 0.456, 0.406))
    grey, raw = prepared(size=8, mean=(0.,), std=(1.,)), prepared(size=8, mean=(0.,) * 3, std=(1 / 255,) * 3)
    image = Image.new('RGB', (8, 8), (255, 255, 255))
    assert grey(image).shape == (1, 8, 8) and raw(image).allclose(torch.full((3, 8, 8), 255.))
    assert raw.shown(raw(image)[None]).allclose(torch.ones(1, 3, 8, 8))


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    (tmp_path / 'bad.png').write_bytes(b'nothing')
    with pytest.raises(zp.PruneError, match=r"bad\.png' is no image that can be read"):
        Images([str(tmp_path / 'bad.png')], prepared(size=8, mean=(0.,), std=(1.,)))[0]


def test_folders_in_order() -> None:
    assert class_outputs(['a', 'b'], 'auto', 2) == class_outputs(['10', '9'], 'sorted', 2) == (0, 1)
    assert class_outputs(['0_a', '1_b'], 'auto', 2) == (0, 1)
    with pytest.raises(zp.PruneError, match=r'2 folders of images, but the network has 1000 outputs: .*--classes FILE'):
        class_outputs(['a', 'b'], 'auto', 1000)
    with pytest.raises(zp.PruneError, match=r"is folder '10' output 0, by the order of names, or output 10\?"):
        class_outputs(['10', '9'], 'auto', 2)
    with pytest.raises(zp.PruneError, match=r"is folder '1' output 0"):
        class_outputs(['1', '2'], 'auto', 2)


def test_folders_by_number_and_name() -> None:
    assert class_outputs(['10_rose', '7', '07x'][:2], 'numbers', 1000) == (10, 7)
    with pytest.raises(zp.PruneError, match=r"does not say which output folder '07x'"):
        class_outputs(['07x'], 'numbers', 1000)
    with pytest.raises(zp.PruneError, match="folder '17' is said to be output 17, but the network has outputs 0 to 16"):
        class_outputs(['17'], 'numbers', 17)
    with pytest.raises(zp.PruneError, match="'1_a' and '1_b' are both said to be output 1"):
        class_outputs(['1_a', '1_b'], 'numbers', 3)
    names = ['tench', 'great white shark', 'crane', 'crane']
    assert class_outputs(['Great_White_Shark', 'tench'], 'names', 4, names) == (1, 0)
    with pytest.raises(zp.PruneError, match="'crane' is the name of outputs 2, 3"):
        class_outputs(['crane'], 'names', 4, names)
    with pytest.raises(zp.PruneError, match="which output folder 'whale'"):
        class_outputs(['whale'], 'names', 4, names)
    with pytest.raises(zp.PruneError, match='names of the 4 outputs'):
        class_outputs(['tench'], 'names', 4)


def test_folders_by_file(tmp_path: Path) -> None:
    lines, mapping = tmp_path / 'classes.txt', tmp_path / 'classes.json'
    lines.write_text('n01 tench, Tinca tinca\nn02 goldfish\nrose\n')
    assert class_outputs(['n02', 'rose', 'n01'], str(lines), 3) == (1, 2, 0)
    with pytest.raises(zp.PruneError, match='has 3 lines, but the network has 4 outputs'):
        class_outputs(['rose'], str(lines), 4)
    with pytest.raises(zp.PruneError, match="which output folder 'n03'"):
        class_outputs(['n03'], str(lines), 3)
    mapping.write_text(json.dumps({'a': 5, 'b': 2, 'unused': 0}))
    assert class_outputs(['b', 'a'], str(mapping), 6) == (2, 5)
    for text, message in (('{"a": true}', 'does not say'), ('[1]', 'does not say'), ('{', 'is no JSON')):
        mapping.write_text(text)
        with pytest.raises(zp.PruneError, match=message):
            class_outputs(['a'], str(mapping), 3)
    with pytest.raises(zp.PruneError, match='neither a file that can be read nor one of auto, sorted'):
        class_outputs(['a'], 'automatic', 3)


@pytest.mark.parametrize('name', NAMES)
def test_composites_by_name(name: str) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    composite = composite_by_name(name, [0.5], [0.25])
    with composite.context(network) as modified:
        assert modified(torch.zeros(1, 1, 2, 2)).shape == (1, 2)


def test_bounds_are_black_and_white() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    x, mean, std = torch.randn(2, 3, 2, 2), torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.5, 1.0])
    low, high = ((value - mean) / std for value in (torch.zeros(3), torch.ones(3)))
    expected = EpsilonGammaBox(low=low[None, :, None, None], high=high[None, :, None, None])
    found = composite_by_name('epsilon_gamma_box', mean.tolist(), std.tolist())
    assert zp.heatmap(network, found, x, 'predicted').allclose(zp.heatmap(network, expected, x, 'predicted'))
