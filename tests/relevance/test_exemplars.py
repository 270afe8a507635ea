'''Exemplars against a brute-force search over samples taken one by one.'''

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import Residual, chain, composite, images, labels, seeded
from torch import nn

import zennit_prune as zp
from zennit_prune.looking import receptive_field
from zennit_prune.relevance import _exemplars as best

COUNT = 14
FIELDS = ('samples', 'values', 'positions', 'by_class', 'peak', 'shares', 'share_samples', 'share_classes')


def pruner(model: nn.Module | None = None) -> zp.Pruner:
    model = (model or seeded(Residual())).double()
    return zp.Pruner(model, composite('epsilon_plus_flat'), images(dtype=torch.float64))


def data(size: int = 3) -> list[Any]:
    return list(zip(images(COUNT, dtype=torch.float64).split(size), labels(COUNT, 3).split(size)))


def collected(size: int = 3, **options: Any) -> zp.Relevance:
    return pruner().collect(data(size), exemplars=options.pop('exemplars', 4), progress=False, **options)


def equal(left: Any, right: Any) -> bool:
    return left.classes == right.classes and left.grids == right.grids and all(
        torch.allclose(getattr(left, field)[name].double(), getattr(right, field)[name].double(), atol=1e-14)
        for field in FIELDS for name in left.samples)


@pytest.mark.parametrize('aggregate', ['abs', 'sumabs', 'signed'])
def test_equals_a_search_over_single_samples(aggregate: str) -> None:
    found = collected(aggregate=aggregate)
    alone = [pruner().collect([batch], aggregate=aggregate, progress=False) for batch in data(1)]
    exemplars = found.exemplars
    assert exemplars is not None and exemplars.classes == [0, 1, 2]
    for name in found:
        scores = torch.stack([relevance[name] for relevance in alone])  # (samples, channels)
        values, order = scores.sort(dim=0, descending=True)
        assert torch.equal(exemplars.samples[name], order[:4].T)
        assert torch.allclose(exemplars.values[name], values[:4].T) and torch.allclose(exemplars.peak[name], values[0])
        shares = scores.abs() / scores.abs().sum(1, keepdim=True)
        assert torch.allclose(exemplars.shares[name], shares.amax(0))
        assert torch.equal(exemplars.share_samples[name], shares.argmax(0))
        assert torch.equal(exemplars.share_classes[name], labels(COUNT, 3)[shares.argmax(0)])
        for number in range(3):
            assert torch.allclose(exemplars.by_class[name][number], scores[labels(COUNT, 3) == number].mean(0))


@pytest.mark.parametrize('size', [1, 5, COUNT])
def test_batches_do_not_matter(size: int) -> None:
    assert equal(collected().exemplars, collected(size).exemplars)


def test_positions_are_where_a_single_pixel_is() -> None:
    '''A network that passes pixels on: relevance is largest at the brightest.'''
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
                          nn.Linear(4, 2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5 if parameter.dim() > 1 else 0)
    x = torch.zeros(3, 1, 5, 7)
    for sample, (row, column) in enumerate([(0, 6), (4, 2), (3, 3)]):
        x[sample, 0, row, column] = 1
    found = zp.Pruner(model, None, x).collect((x, labels(3, 2)), exemplars=5, progress=False).exemplars
    assert found is not None and found.grids['0'] == (5, 7) and found.positions['0'].shape == (3, 5, 2)
    for channel in range(3):
        seen = dict(zip(found.samples['0'][channel].tolist(), found.positions['0'][channel].tolist()))
        assert seen == {0: [0, 6], 1: [4, 2], 2: [3, 3], -1: [-1, -1]}
    assert (found.values['0'][:, 3:] == 0).all()


def test_saved_and_loaded(tmp_path: Path) -> None:
    relevance = collected()
    relevance.save(tmp_path / 'relevance')
    loaded = zp.Relevance.load(tmp_path / 'relevance').exemplars
    assert equal(relevance.exemplars, loaded) and loaded is not None
    assert loaded.positions['stem'].dtype == torch.int64 and loaded.values['stem'].dtype == torch.float64
    assert pruner().collect(data(), progress=False).exemplars is None


def test_checkpoints_and_merging_give_the_same(tmp_path: Path) -> None:
    expected, path = collected().exemplars, tmp_path / 'checkpoint'

    def stopping() -> Any:
        yield from data()[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruner().collect(stopping(), exemplars=4, progress=False, checkpoint=path)
    with pytest.raises(zp.PruneError, match='exemplars'):
        pruner().collect(data(), exemplars=5, progress=False, checkpoint=path)
    resumed = pruner().collect(data(), exemplars=4, progress=False, checkpoint=path)
    assert equal(resumed.exemplars, expected)
    halves = [pruner().collector(exemplars=4) for _ in range(2)]
    for collector, part in zip(halves, (data()[:2], data()[2:])):
        with collector:
            for inputs, target in part:
                collector.update(inputs, target)
    assert equal(halves[0].merge(halves[1]).compute().exemplars, expected)


def test_samples_left_out_keep_their_numbers() -> None:
    broken = [(x.clone(), y) for x, y in data()]
    broken[0][0][1] = torch.nan
    with pytest.warns(zp.PruneWarning):
        found = pruner().collect(broken, exemplars=COUNT, nonfinite='skip', progress=False).exemplars
    assert found is not None
    for row in found.samples['stem'].tolist():
        assert sorted(row) == [-1, 0, *range(2, COUNT)]
    found = pruner().collect(data(), exemplars=COUNT, classes=(1,), progress=False).exemplars
    assert found is not None and found.classes == [1]
    assert sorted(set(found.samples['stem'][0].tolist())) == [-1, 1, 4, 7, 10, 13]


def test_classes_are_bounded_and_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best, 'MOST_CLASSES', 2)
    relevance = collected()
    assert relevance.exemplars is not None and relevance.exemplars.classes == [0, 1]
    assert 'first 2 classes were kept, without those of 4 samples' in str(relevance.info['notes'])
    relevance = pruner().collect(data(), exemplars=2, initial=torch.sigmoid, progress=False)
    assert relevance.exemplars is not None and relevance.exemplars.classes == []
    plan = zp.Plan(pruner().graph, {'stem': [0]})
    found = plan.at_risk(relevance)
    assert found.classes is None and found.rows == () and len(found.channels) == 1
    assert 'class' in str(found).splitlines()[0] and 'lost on average' not in str(found)


@pytest.mark.parametrize('criterion', ['taylor', 'gradient', 'activation'])
def test_other_criteria(criterion: str) -> None:
    relevance = collected(criterion=criterion)
    assert relevance.exemplars is not None
    assert torch.allclose(relevance.exemplars.peak['stem'], relevance.exemplars.values['stem'].amax(1))


@pytest.mark.parametrize('criterion', ['l1', 'random', 'wanda'])
def test_criteria_without_samples_are_refused(criterion: str) -> None:
    with pytest.raises(zp.PruneError, match=criterion):
        collected(criterion=criterion)


@pytest.mark.parametrize('count', [-1, 2.5, True])
def test_bad_counts(count: Any) -> None:
    with pytest.raises(zp.PruneError, match='exemplars='):
        collected(exemplars=count)


def test_images_of_other_sizes_are_refused() -> None:
    mixed = [*data(), (images(2, 12, dtype=torch.float64), labels(2))]
    with pytest.raises(zp.PruneError, match='inputs of one size'):
        pruner().collect(mixed, exemplars=2, progress=False)


# --- what a plan puts at risk
def test_channels_and_classes_at_risk() -> None:
    relevance = collected()
    assert relevance.exemplars is not None
    plan = zp.Plan(pruner().graph, {'stem': [0, 3], 'block2.conv1': [1, 2, 5]})
    both = plan.at_risk(relevance, 3)
    found, losses = both.channels, both.classes
    everything = {(name, channel): float(relevance.exemplars.shares[name][channel])
                  for name, channels in plan.removed.items() for channel in channels}
    assert [(risk.group, risk.channel) for risk in found] == sorted(everything, key=lambda key: -everything[key])[:3]
    assert [risk.value for risk in found] == sorted(everything.values(), reverse=True)[:3]
    assert losses is not None and losses.shape == (3, 3)
    assert both.rows == tuple(relevance.exemplars.classes) and both.columns == tuple(relevance.exemplars.by_class)
    shown = str(both)
    assert f'{found[0].group}  ' in shown and f'{found[0].value:.0%}' in shown
    assert f'{losses.mean(1).max():.0%}' in shown and f'{losses.max():.0%}' in shown
    assert 'lost on average' in both._repr_html_()
    for row in range(3):
        for column, name in enumerate(relevance.exemplars.by_class):
            means = relevance.exemplars.by_class[name][row]
            assert float(losses[row, column]) == pytest.approx(
                float(means[list(plan.removed.get(name, ()))].sum() / means.sum()))
    with pytest.raises(zp.PruneError, match='without reference samples'):
        plan.at_risk(pruner().collect(data(), progress=False))
    with pytest.raises(zp.PruneError, match='another network'):
        zp.Plan(zp.trace(chain(), images()), {'0': [0]}).at_risk(relevance)
    with pytest.raises(zp.PruneError, match='a Relevance is needed'):
        plan.at_risk(relevance.exemplars)  # type: ignore[arg-type]


# --- receptive fields
def test_receptive_fields_of_a_plain_network() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1),
                          nn.ReLU(), nn.Conv2d(5, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = images(1, 24)
    first, second = (receptive_field(model, x, name) for name in ('0', '3'))
    assert first.shape == (12, 12, 4) and second.shape == (6, 6, 4)
    for row in range(12):
        assert first[row, 5].tolist() == [max(0, 2 * row - 1), min(24, 2 * row + 2), 9, 12]
    for row in range(6):  # 2 pooled by 2 from convolutions at 2 pixels, one more on either side
        assert second[row, 3, :2].tolist() == [max(0, 4 * (row - 1) - 1), min(24, 4 * (row + 1) + 4)]


def test_crops_show_the_field_and_pad_it_at_borders() -> None:
    relevance = pruner().collect(data(), exemplars=6, progress=False)
    assert relevance.exemplars is not None
    x = images(COUNT, dtype=torch.float64)
    fields = receptive_field(seeded(Residual()).double(), x, 'block1.conv1')
    crops = relevance.exemplars.crops(x, 'block1.conv1', 2, fields)
    assert crops.shape == (6, 3, 5, 5)
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    for crop, sample, (row, column) in zip(crops, relevance.exemplars.samples['block1.conv1'][2].tolist(),
                                           relevance.exemplars.positions['block1.conv1'][2].tolist()):
        assert torch.equal(crop, padded[sample, :, row:row + 5, column:column + 5])
    with pytest.raises(zp.PruneError, match='grid'):
        relevance.exemplars.crops(x, 'block1.conv1', 2, fields[:3])
