'''Networks by name or file, and weights from files.'''
from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import images
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import zennit_prune as zp
from zennit_prune.cli._sources import Source, build, categories, load_weights, weights_url


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError('something wants to be downloaded')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', refuse)


def test_networks_of_torchvision() -> None:
    network = build(Source.parse('torchvision:resnet18'), 7)
    assert isinstance(network, torchvision.models.ResNet) and not network.training
    assert network.fc.out_features == 7
    with pytest.raises(zp.PruneError, match=r"torchvision has no classifier 'resnet19': do you mean .*resnet18"):
        build(Source.parse('torchvision:resnet19'))
    with pytest.raises(zp.PruneError, match='no classifier'):  # its backbone's weights would be downloaded
        build(Source.parse('torchvision:fcn_resnet50'))


def test_networks_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('timm')
    assert sum(parameter.numel() for parameter in build(Source.parse('timm:resnet18'), 5).parameters()) == 11_179_077
    with pytest.raises(zp.PruneError, match="timm has no classifier 'resnet18x'"):
        build(Source.parse('timm:resnet18x'))
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(zp.PruneError, match='pip install timm'):
        build(Source.parse('timm:resnet18'))


@pytest.mark.parametrize('text', ['resnet18', 'torchvision:', 'keras:resnet50', 'net.py', 'net.py:', 'net.txt:f',
                                  'timm:hf_hub:someone/net', 'net.py:not-a-name'])
def test_other_texts_name_no_network(text: str) -> None:
    with pytest.raises(zp.PruneError, match='names no network: give torchvision:NAME, timm:NAME or FILE'):
        Source.parse(text)


def test_functions_in_files(tmp_path: Path) -> None:
    file = images.network_file(tmp_path)
    (tmp_path / 'nets.py').write_text('import beside_it\n' + file.read_text())
    (tmp_path / 'beside_it.py').write_text('')
    path = list(sys.path)
    assert isinstance(build(Source.parse(f'{file}:colours')), nn.Sequential)
    for function, message in (('broken', r'RuntimeError: no such\ndisk \(nets.py, line \d+\)'),
                              ('nothing', 'returns a NoneType: return the network'),
                              ('absent', "has no function 'absent'")):
        with pytest.raises(zp.PruneError, match=message):
            build(Source.parse(f'{file}:{function}'))
    with pytest.raises(zp.PruneError, match='there is no file'):
        build(Source.parse(f'{tmp_path}/other.py:colours'))
    with pytest.raises(zp.PruneError, match=r'--outputs 3 .* let colours\(\)'):
        build(Source.parse(f'{file}:colours'), 3)
    assert sys.path == path


def small(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, outputs))


@pytest.mark.parametrize('wrap', ['plain', 'state_dict', 'parallel', 'safetensors', 'old'])
def test_weights(tmp_path: Path, wrap: str) -> None:
    weights = {key: torch.rand_like(value) if value.is_floating_point() else value + 5
               for key, value in small().state_dict().items()}
    path, notes = tmp_path / ('w.safetensors' if wrap == 'safetensors' else 'w.pth'), []
    if wrap == 'safetensors':
        save_file(weights, path)
    elif wrap == 'state_dict':
        torch.save({'epoch': 3, 'state_dict': weights, 'optimizer': {'lr': 0.1}}, path)
        notes = ["the weights are those under 'state_dict' in w.pth"]
    elif wrap == 'parallel':
        torch.save({f'module.{key}': value for key, value in weights.items()}, path)
        notes = ["'module.' is dropped from all names in w.pth"]
    elif wrap == 'old':
        del weights['1.num_batches_tracked']
        torch.save(weights, path)
    else:
        torch.save(weights, path)
    network = small()
    assert load_weights(network, path) == notes
    for key, value in weights.items():
        assert torch.equal(network.state_dict()[key], value)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path, network = tmp_path / 'w.pth', small()
    before = {key: value.clone() for key, value in network.state_dict().items()}

    def refused(contents: Any, message: str) -> None:
        torch.save(contents, path)
        with pytest.raises(zp.PruneError, match=message):
            load_weights(network, path)

    weights = small().state_dict()
    refused({key: value for key, value in weights.items() if key != '3.bias'}, 'missing: 3.bias. Hint')
    refused({**weights, 'extra': torch.ones(1)}, 'unexpected: extra. Hint')
    refused(small(5).state_dict(), r'3.weight is \(5, 2\), not \(3, 2\).*--outputs N')
    refused({**weights, 'epoch': 3}, 'holds epoch')
    refused({}, 'holds nothing')
    refused([1], 'holds a list, not weights by name')
    refused(network, 'without executing code')
    path.write_bytes(b'damaged')
    with pytest.raises(zp.PruneError, match='damaged'):
        load_weights(network, path)
    (tmp_path / 'w.safetensors').write_bytes(b'damaged')
    with pytest.raises(zp.PruneError, match='cannot be read'):
        load_weights(network, tmp_path / 'w.safetensors')
    with pytest.raises(zp.PruneError, match='there is no file of weights'):
        load_weights(network, tmp_path / 'none.pth')
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())


def test_what_torchvision_says_of_its_weights() -> None:
    source = Source.parse('torchvision:resnet18')
    assert categories(source, 1000)[:2] == ['tench', 'goldfish'] and categories(source, 17) == []
    assert str(weights_url(source)).startswith('https://')
    assert weights_url(Source.parse('timm:resnet18')) is None and categories(Source.parse('timm:resnet18'), 1000) == []
