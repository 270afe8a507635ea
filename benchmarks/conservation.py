'''Is relevance conserved from the output to the input?

The sum of ``EpsilonPlus`` relevance at the input over the initial one (one-hot at the predicted class): with Zennit
alone, with the graph's canonizer, with rules that leave biases out, and on a network that has none (its biases and
running means are zero); last, the L1 norm there. Torchvision's networks have random weights with BatchNorm
calibrated on the inputs, in float64; the CIFAR networks are pretrained, and found with their images in the folder that
``ZENNIT_PRUNE_DATA`` names, with its ``loaders.py``. The median over eight samples.

    python benchmarks/conservation.py [network ...]
'''
from __future__ import annotations

import copy
import os
import sys
import warnings
from pathlib import Path

import torch
import torchvision
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus
from zennit.core import Composite

import zennit_prune as zp

DATA = Path(os.environ.get('ZENNIT_PRUNE_DATA', Path(__file__).resolve().parents[2] / 'shared' / 'data'))
RANDOM = ('resnet18', 'resnet50', 'vgg16_bn', 'googlenet', 'densenet121', 'mobilenet_v2', 'efficientnet_b0',
          'regnet_y_400mf', 'convnext_tiny', 'vit_b_16', 'swin_t')
TRAINED = ('resnet8_mlperftiny_cifar10', 'resnet20_cifar10', 'resnet56_cifar10')
SAMPLES = 8


def random_network(name: str) -> tuple[nn.Module, torch.Tensor]:
    '''A network of torchvision and the inputs its BatchNorm was calibrated on.'''
    torch.manual_seed(0)
    options = {'aux_logits': False, 'init_weights': True} if name == 'googlenet' else {}
    model = getattr(torchvision.models, name)(**options).double()
    if hasattr(model, 'heads'):  # torchvision's ViT starts with a head of zeros
        nn.init.normal_(model.heads.head.weight, std=0.02)
    x = torch.randn(SAMPLES, 3, 224, 224, dtype=torch.float64)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
        elif isinstance(module, nn.Dropout):
            module.eval()
    with torch.no_grad():
        model(x)
    return model.eval(), x


def trained_network(name: str) -> tuple[nn.Module, torch.Tensor]:
    '''A pretrained network and test images.'''
    sys.path.insert(0, str(DATA))
    import loaders

    model, preprocess = loaders.load(name)
    return model.double(), preprocess(loaders.cifar10('test_5k')[0][:SAMPLES]).double()


def without_biases(model: nn.Module) -> nn.Module:
    '''The network with biases and running means of zero.'''
    model = copy.deepcopy(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(('bias', 'running_mean')):
            tensor.detach().zero_()
    return model


def at_input(model: nn.Module, composite: Composite, x: torch.Tensor) -> tuple[float, float]:
    '''The median over samples of the sum of relevance, and of its absolute values.'''
    sums = []
    for sample in x.split(2):
        with Gradient(copy.deepcopy(model), composite) as attributor:
            _, relevance = attributor(sample, lambda output: nn.functional.one_hot(
                output.argmax(1), output.shape[1]).to(output))
        sums.append(torch.stack([relevance.flatten(1).sum(1), relevance.abs().flatten(1).sum(1)], 1))
    values = torch.cat(sums).median(0).values
    return float(values[0]), float(values[1])


def attempt(*args: object) -> str:
    try:
        return f'{at_input(*args)[0]:.4g}'  # type: ignore[arg-type]
    except (RuntimeError, IndexError, TypeError) as error:
        return f'fails: {type(error).__name__}'


def main(names: list[str]) -> None:
    warnings.simplefilter('ignore')
    print('| network | Zennit alone | canonized | rules without biases | network without biases | L1 norm |')
    print('| --- | --- | --- | --- | --- | --- |')
    for name in names or [*RANDOM, *TRAINED]:
        model, x = random_network(name) if name in RANDOM else trained_network(name)
        canonizer = zp.GraphCanonizer(model, x[:1])
        bare, norm = at_input(without_biases(model), EpsilonPlus(canonizers=[canonizer]), x)
        composites = (EpsilonPlus(), EpsilonPlus(canonizers=[canonizer]),
                      EpsilonPlus(zero_params='bias', canonizers=[canonizer]))
        cells = [*(attempt(model, composite, x) for composite in composites), f'{bare:.4g}', f'{norm:.3g}']
        print(f'| {name} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    torch.set_num_threads(1)
    main(sys.argv[1:])
