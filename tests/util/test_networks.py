'''What a network is before it can be pruned: out of its wrapper, without masks, in floating point.'''
from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import chain, images, same, snapshot
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import zennit_prune as zp


def planned() -> tuple[nn.Module, zp.Plan]:
    model = chain()
    return model, zp.Plan(zp.trace(model, images()), {'0': [1, 2], '2': [0]})


def masked(*layers: int) -> nn.Module:
    model = chain()
    for layer in layers:
        prune.l1_unstructured(model.get_submodule(str(layer)), 'weight', 0.3)
    model(images())
    return model


# --- masks


@pytest.mark.parametrize('act', [
    lambda model, plan, small: zp.trace(model, images()),
    lambda model, plan, small: zp.Pruner(model, None, images()),
    lambda model, plan, small: zp.prune(model, None, [], zp.Budget(flops=0.5)),
    lambda model, plan, small: plan.apply(model),
    lambda model, plan, small: plan.apply_(model),
    lambda model, plan, small: plan.masked(model),
    lambda model, plan, small: zp.verify(model, small, plan, images()),
    lambda model, plan, small: zp.verify(small, model, plan, images()),
    lambda model, plan, small: zp.repair(model, small, plan, [images()]),
])
def test_masks_are_refused_with_the_remedy(act: Callable[[nn.Module, zp.Plan, nn.Module], Any]) -> None:
    original, plan = planned()
    model, small = masked(0, 2), plan.apply(original)
    assert zp.heatmap(model, None, images()).shape == (4, 8, 8)  # nothing is removed to look at it
    before = snapshot(model)
    with pytest.raises(zp.PruneError, match=r"masks of .*: '0\.weight' \(Conv2d\), '2\.weight' \(Conv2d\)") as error:
        act(model, plan, small)
    assert same(before, snapshot(model))
    for line in str(error.value).split('): ')[1].split('; '):
        exec(line, {'torch': torch, 'model': model})
    assert zp.trace(model, images()).groups


@pytest.mark.parametrize('wrap', [lambda model: model, nn.DataParallel, AveragedModel])
def test_many_masks_are_removed_at_once(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(masked())
    inner = model if wrap.__name__ == '<lambda>' else model.module
    for layer in inner:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            prune.random_unstructured(layer, 'weight', 0.3)
            prune.ln_structured(layer, 'weight', 0.5, n=2, dim=0)  # two masks on one tensor
            prune.l1_unstructured(layer, 'bias', 0.3)
    with pytest.raises(zp.PruneError, match=r'10 of its tensors.*and 7 more') as error:
        zp.trace(model, images())
    eval(str(error.value).split('all at once: ')[1], {'torch': torch, 'model': model})
    assert zp.trace(model, images()).groups


def test_masks_of_the_network_itself_and_of_files() -> None:
    root = prune.l1_unstructured(nn.Linear(3, 4), 'weight', 0.3)
    with pytest.raises(zp.PruneError, match=r"torch\.nn\.utils\.prune\.remove\(model, 'weight'\)$"):
        zp.trace(root, torch.zeros(2, 3))
    file = io.BytesIO()
    torch.save(masked(2), file)
    file.seek(0)
    with pytest.raises(zp.PruneError, match=r"prune\.remove\(model\.get_submodule\('2'\), 'weight'\)$"):
        zp.trace(torch.load(file, weights_only=False), images())


def test_masks_that_are_parametrizations_are_narrowed_along() -> None:
    class Sparse(nn.Module):
        def __init__(self, mask: torch.Tensor):
            super().__init__()
            self.register_buffer('mask', mask)

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return self.mask * weight

    model, plan = planned()
    register_parametrization(model[2], 'weight', Sparse((torch.rand(5, 6, 3, 3) > 0.5).float()))
    plan = zp.Plan(zp.trace(model, images()), dict(plan.removed))
    small = plan.apply(model)
    assert small[2].parametrizations.weight[0].mask.shape == (4, 4, 3, 3)


# --- quantization


def prepared(network: nn.Module) -> nn.Module:
    network.qconfig = torch.ao.quantization.get_default_qat_qconfig('fbgemm')  # type: ignore[assignment]
    return torch.ao.quantization.prepare_qat(network.train())


class Quantizable(nn.Module):
    '''A network with stubs, a sum that quantization sees, and layers that can be fused.'''

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.add = torch.ao.nn.quantized.FloatFunctional()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.inner, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.conv(self.quant(x))))
        return self.dequant(self.fc(self.add.add_relu(x, self.inner(x)).mean((2, 3))))


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
def test_fake_quantization_is_refused_and_goes_on_after_pruning() -> None:
    model = Quantizable().eval()
    plan = zp.Plan(zp.trace(model, images()), {'conv': [0, 1, 2]})
    small = plan.apply(model)
    fused = torch.ao.quantization.fuse_modules(copy.deepcopy(small), [['conv', 'norm', 'relu']])
    assert zp.trace(fused, images()).groups
    trained = prepared(small)
    trained(images()).sum().backward()
    assert torch.ao.quantization.convert(trained.eval())(images()).shape == (4, 4)
    aware = prepared(model)
    for act in (lambda: zp.trace(aware, images()), lambda: plan.apply(aware), lambda: plan.masked(aware),
                lambda: zp.verify(model, aware, plan, images()),
                lambda: zp.repair(aware, small, plan, [images()])):
        with pytest.raises(zp.PruneError, match=r"quantization: .*'conv' \(Conv2d\).*floating point first"):
            act()


# --- wrappers


@pytest.mark.parametrize('buffers', [True, False])
def test_averages_are_pruned_like_the_network(buffers: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    average.update_parameters(model)
    plan = zp.Plan(zp.trace(average, images()), {'0': [1, 2]})
    small = plan.apply(average)
    assert torch.equal(small[0].weight, plan.apply(average.module)[0].weight) and type(small) is nn.Sequential
    plan.apply_(model)
    assert plan.apply_(average) is average and average.module[4].weight.shape == (4, 6 * 36)
    before = average.module[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    average.update_parameters(model)
    torch.testing.assert_close(average.module[0].weight, 0.9 * before + 0.1 * model[0].weight)


def test_the_network_within_an_unknown_wrapper_is_named() -> None:
    class Wrapper(nn.Module):
        def __init__(self, ema_model: nn.Module):
            super().__init__()
            self.ema_model = ema_model

    model, plan = planned()
    wrapper = Wrapper(copy.deepcopy(model))
    with pytest.raises(zp.PruneError, match=r"fits \('ema_model'\).* plan\.apply_\(wrapper\.ema_model\)"):
        plan.apply_(wrapper)
    plan.apply_(wrapper.ema_model)
    assert wrapper.ema_model[0].weight.shape[0] == 4
    with pytest.raises(zp.PruneError, match=r"plan\.apply_\(wrapper\.get_submodule\('0'\)\)"):
        plan.apply(nn.ModuleList([copy.deepcopy(model)]))
    with pytest.raises(zp.PruneError, match=r'not the network that was traced.* Trace it again'):
        plan.apply(wrapper)
