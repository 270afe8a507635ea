'''Several targets per sample, class subsets, masks: each equals passes with one plain target, added up by hand.'''

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import Residual, apart, chain, composite, images, labels, seeded
from torch import nn
from torch.nn import functional as F
from zennit.attribution import SmoothGrad

import zennit_prune as zp
from zennit_prune.relevance._initial import initial_relevance

ONE_BY_ONE = {'epsilon_plus': composite, 'epsilon': lambda: None}


def pruner(model: nn.Module | None = None, rules: Any = None) -> zp.Pruner:
    return zp.Pruner((model or chain()).double(), rules or composite(), images(dtype=torch.float64))


def x(count: int = 4) -> torch.Tensor:
    return images(count, dtype=torch.float64)


def undecided() -> nn.Module:
    '''A network that does not predict the same class for all images.'''
    model = chain().double()
    with torch.no_grad():
        model[-1].bias -= model(x()).mean(0)
    return model


def collected(tool: zp.Pruner, inputs: Any, target: Any, **options: Any) -> zp.Relevance:
    return tool.collect([(inputs, target)], progress=False, **options)


def same(found: zp.Relevance, expected: zp.Relevance | dict[str, torch.Tensor]) -> bool:
    return all(apart(found[name], expected[name]) <= 1e-10 for name in found)


def mean(*parts: zp.Relevance) -> dict[str, torch.Tensor]:
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


# --- several targets
@pytest.mark.parametrize('aggregate', ['abs', 'sumabs', 'signed', 'positive'])
@pytest.mark.parametrize('initial', ['one-hot', 'logit', 'softmax', 'contrastive'])
def test_several_targets_are_aggregated_one_by_one(initial: str, aggregate: str) -> None:
    '''The first sample has three targets, the second two, the third one, the last none: the first three weigh the
    same.'''
    tool, options = pruner(), {'initial': initial, 'aggregate': aggregate}
    target = torch.tensor([[0, 3, 1], [2, -1, 1], [3, -1, -1], [-1, -1, -1]])
    found = collected(tool, x(), target, **options)
    samples = [
        mean(*(collected(tool, x()[[row]], torch.tensor([label]), **options) for label in target[row] if label >= 0))
        for row in range(3)
    ]
    assert found.info['samples'] == 3
    assert same(found, {name: torch.stack([sample[name] for sample in samples]).mean(0) for name in found})


@pytest.mark.parametrize('build', [chain, lambda: seeded(Residual())])
@pytest.mark.parametrize('rules', ONE_BY_ONE)
def test_one_forward_pass_serves_all_targets(build: Callable[[], nn.Module], rules: str) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build().double()

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            calls.append(len(values))
            return self.inner(values)

    calls: list[int] = []
    tool = zp.Pruner(Counting().eval(), ONE_BY_ONE[rules](), x())
    calls.clear()
    with tool.collector() as collector:
        collector.update(x(), torch.stack([labels(), (labels() + 1) % 4], 1))
    assert calls == [4]
    assert same(collector.compute(), mean(collected(tool, x(), labels()), collected(tool, x(), (labels() + 1) % 4)))


def test_as_many_targets_as_classes_are_rows() -> None:
    rows = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]])
    tool = pruner()
    assert same(collected(tool, x(), rows), collected(tool, x(), rows.double()))


def test_samples_without_a_target_do_not_count() -> None:
    tool = pruner()
    rows = F.one_hot(labels(), 4)
    rows[1] = 0
    found = collected(tool, x(), rows)
    assert found.info['samples'] == 3
    assert same(found, collected(tool, x()[[0, 2, 3]], labels()[[0, 2, 3]]))


def test_the_mean_of_several_targets_as_initial_relevance() -> None:
    output = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    found = initial_relevance(output, torch.tensor([[0, 2], [1, -1]]), 'one-hot')
    assert torch.equal(found, torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0]]))


# --- a rival
def test_the_rival_of_several_labels_is_another_class_and_weighs_as_much() -> None:
    output = torch.tensor([[1.0, 5.0, 3.0, 2.0]])
    found = initial_relevance(output, torch.tensor([[0.0, 1.0, 1.0, 0.0]]), 'contrastive')
    assert found.tolist() == [[0, 1, 1, -2]]


def test_no_rival_where_all_classes_are_targets() -> None:
    found = initial_relevance(torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 1.0]]), 'contrastive')
    assert found.tolist() == [[1, 1]]


# --- predictions without labels
def test_target_in_place_of_labels() -> None:
    model = undecided()
    tool, target = pruner(model), model(x()).argmax(1)
    expected = collected(tool, x(), target)
    wrong = (target + 1) % 4
    for loader in ([x()], x(), [(x(), wrong)], (x(), wrong), [(x(), 'predicted')]):
        override = None if loader[0][-1] == 'predicted' else 'predicted'
        assert same(tool.collect(loader, target=override, progress=False), expected)


# --- classes
@pytest.mark.parametrize('classes', [(3, 1), [1], torch.tensor([0, 2, 3]), (0, 1, 2, 3)])
@pytest.mark.parametrize('initial', ['one-hot', 'softmax', torch.sigmoid])
def test_classes_leave_other_samples_out(classes: Any, initial: Any) -> None:
    tool, target = pruner(), labels(11)
    inputs = x(11)
    wanted = [row for row in range(11) if int(target[row]) in [int(number) for number in classes]]
    expected = collected(tool, inputs[wanted], target[wanted], initial=initial)
    loader = list(zip(inputs.split(3), target.split(3)))
    found = tool.collect(loader, classes=classes, initial=initial, progress=False)
    assert found.info['samples'] == len(wanted)
    assert found.info['classes'] == sorted(int(number) for number in classes)
    assert same(found, expected)
    assert found.reliability().groups == pytest.approx(expected.reliability().groups)


def test_classes_of_several_targets_and_rows() -> None:
    tool = pruner()
    several = torch.tensor([[0, 3], [2, -1], [3, 1], [1, -1]])
    found = collected(tool, x(), several, classes=(1, 3))
    assert found.info['samples'] == 3
    assert same(found, collected(tool, x(), torch.tensor([[3, -1], [-1, -1], [3, 1], [1, -1]])))
    rows = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]])
    assert same(collected(tool, x(), rows, classes=(0, 1)), collected(tool, x(), rows * torch.tensor([1, 1, 0, 0])))


def test_predictions_and_rivals_are_among_the_classes() -> None:
    model = undecided()
    tool, output = pruner(model), model(x())
    among = torch.tensor([0, 2])[output[:, [0, 2]].argmax(1)]
    assert set(among.tolist()) == {0, 2} and not torch.equal(among, output.argmax(1))
    assert same(collected(tool, x(), 'predicted', classes=(0, 2)), collected(tool, x(), among))
    one, other = torch.zeros(2, 4), torch.zeros(2, 4)
    one[:, 0], other[:, 2] = 1, 1
    found = collected(tool, x(2), torch.tensor([0, 2]), classes=(0, 2), initial='contrastive')
    start = torch.stack([(one - other)[0], (other - one)[1]]).double()
    assert same(found, tool.collect([x(2)], initial=lambda _: start, progress=False))


def test_samples_of_other_classes_never_reach_the_network() -> None:
    sizes = []

    def noting(output: torch.Tensor) -> torch.Tensor:
        sizes.append(len(output))
        return torch.ones_like(output)

    inputs = x(8)
    inputs[1] = float('nan')  # what is not looked at may hold anything
    pruner().collect(list(zip(inputs.split(4), labels(8).split(4))), classes=[3], initial=noting, progress=False)
    assert set(sizes) == {1}


# --- dense outputs
def segmentation() -> nn.Module:
    return seeded(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))).double()


@pytest.mark.parametrize('initial', ['one-hot', 'logit', 'softmax', 'contrastive'])
@pytest.mark.parametrize('nothing', [-1, 255, -100])
def test_pixels_of_no_class_start_no_relevance(initial: str, nothing: int) -> None:
    tool = pruner(segmentation(), zp.Pruner(chain(), None, images()).composite)
    mask = torch.randint(0, 4, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    mask[0, :4], mask[1] = nothing, nothing
    found = collected(tool, x(3), mask, initial=initial)

    def start(output: torch.Tensor) -> torch.Tensor:
        relevance = initial_relevance(output, mask[[0, 2]].clamp(min=0) % 255 % 4, initial)
        return relevance * ((mask[[0, 2]] >= 0) & (mask[[0, 2]] < 4)).unsqueeze(1)

    assert found.info['samples'] == 2
    assert same(found, tool.collect([x(3)[[0, 2]]], initial=start, progress=False))


def test_masks_of_bytes_and_of_255_classes() -> None:
    output = torch.zeros(1, 256, 2)
    found = initial_relevance(output, torch.tensor([[255, 1]], dtype=torch.uint8), 'one-hot')
    assert found[0, 255, 0] == 1 and found[0, 1, 1] == 1 and found.sum() == 2
    assert initial_relevance(output[:, :255], torch.tensor([[255, 1]], dtype=torch.uint8), 'one-hot').sum() == 1


def test_classes_of_a_mask() -> None:
    output = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    tool, mask = pruner(segmentation()), torch.randint(0, 4, (3, 8, 8), generator=torch.Generator().manual_seed(1))
    mask[2] = 0
    found = collected(tool, x(3), mask, classes=(1, 2))
    assert found.info['samples'] == 2 and output.shape == (1, 4, 3)
    assert same(found, collected(tool, x(3), mask.masked_fill((mask == 0) | (mask == 3), -1)))


# --- a single column
COLUMNS: dict[str, tuple[int, ...]] = {'(N,)': (6,), '(N, 1)': (6, 1), '(N, 1, H, W)': (6, 1, 4, 5)}


def column(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(shape, generator=generator, dtype=torch.float64)
    return output, torch.randint(0, 2, shape, generator=generator)


@pytest.mark.parametrize('form', COLUMNS)
@pytest.mark.parametrize('kind', [torch.int64, torch.uint8, torch.bool, torch.float32, torch.float64])
@pytest.mark.parametrize('squeezed', [False, True])
def test_both_classes_of_a_column_count(form: str, kind: torch.dtype, squeezed: bool) -> None:
    output, labels = column(COLUMNS[form])
    target = labels.to(kind)
    if len(output.shape) > 1:
        target = target.squeeze(1) if squeezed else target
    else:
        target = target if squeezed else target.unsqueeze(1)
    signs, p = 2 * labels.double() - 1, output.sigmoid()
    positions = output[0].numel()
    expected = {'one-hot': signs, 'contrastive': signs, 'logit': signs * output, 'softmax': signs * p * (1 - p),
                'cross-entropy': (p - labels) / positions, 'binary-cross-entropy': (p - labels) / positions,
                'value': output}
    for initial, relevance in expected.items():
        assert apart(initial_relevance(output, target, initial), relevance) <= 1e-12


def test_the_class_of_a_column_is_predicted_by_its_sign() -> None:
    output = torch.tensor([[-0.5], [0.0], [2.0]])
    assert initial_relevance(output, 'predicted', 'one-hot').tolist() == [[-1], [1], [1]]
    assert initial_relevance(output, 'predicted', 'logit').tolist() == [[0.5], [0], [2]]
    with pytest.raises(zp.PruneError, match=r"\(3,\), without classes.*initial='value'"):
        initial_relevance(output[:, 0], 'predicted', 'one-hot')


@pytest.mark.parametrize('outputs', [1, 2])
@pytest.mark.parametrize('unknown,known', [(255, 0), (-1, 1)])
def test_masks_in_which_a_class_has_the_number_of_unknown_pixels(outputs: int, unknown: int, known: int) -> None:
    tool = pruner(seeded(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, outputs, 1))).double())
    masks = torch.where(torch.rand(4, 8, 8) < 0.5, unknown, known)
    loader = [(x()[[row]], masks[[row]]) for row in range(4)]
    with pytest.raises(zp.PruneError, match=f'hold {unknown} and no {1 - known} in all of the data.*y > 0'):
        tool.collect(loader, progress=False)
    loader[2][1][0, 0, 0] = 1 - known  # what is unknown may be all that a picture has beside one class
    assert tool.collect(loader, progress=False).info['samples'] == 4


def test_the_loss_of_a_sigmoid_is_that_of_a_probability() -> None:
    logits = torch.randn(4, 1, requires_grad=True)
    output, labels = logits.sigmoid(), torch.tensor([0.0, 1.0, 1.0, 0.0])
    expected, = torch.autograd.grad(F.binary_cross_entropy(output[:, 0], labels, reduction='sum'), output,
                                    retain_graph=True)
    assert apart(initial_relevance(output, labels, 'cross-entropy'), expected) <= 1e-5
    assert initial_relevance(output, labels, 'softmax').flatten().tolist() == [-1, 1, 1, -1]
    soft = torch.rand(4, 1)
    expected, = torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, soft, reduction='sum'), logits)
    assert apart(initial_relevance(logits, soft, 'binary-cross-entropy'), expected) <= 1e-5


def test_pixels_of_a_column_that_are_unknown_start_no_relevance() -> None:
    output, labels = column((6, 1, 4, 5))
    labels[0, 0, :2], labels[1, 0, 0], labels[2] = -1, 255, -100
    found = initial_relevance(output, labels[:, 0], 'one-hot')
    assert torch.equal(found == 0, (labels != 0) & (labels != 1))
    loss = initial_relevance(output, labels, 'cross-entropy')
    assert loss[0].abs().sum() > 0 and loss[0, 0, :2].abs().sum() == 0 and loss[2].abs().sum() == 0


def single(outputs: int = 1, *more: nn.Module) -> nn.Module:
    return seeded(nn.Sequential(nn.Conv2d(3, 6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(6, outputs), *more)).double()


@pytest.mark.parametrize('flat', [False, True])
def test_classes_of_a_column_leave_samples_out(flat: bool) -> None:
    tool = pruner(single(1, *[nn.Flatten(0)] * flat))
    both = torch.tensor([0.0, 1.0, 1.0, 0.0])
    for number in (0, 1):
        found = collected(tool, x(), both, classes=(number,))
        assert found.info['samples'] == 2
        assert same(found, collected(tool, x()[both == number], both[both == number]))
        assert same(found, collected(tool, x(), both.long(), classes=(number,)))
    found = collected(tool, x(), both)
    assert same(found, mean(*(collected(tool, x(), both, classes=(number,)) for number in (0, 1))))


@pytest.mark.parametrize('target,message', [
    (torch.tensor([0.0, 1.0, 0.3, 1.0]), r"label 0\.3\. For a regression.*initial='value'.*all 0 or 1"),
    (torch.tensor([0, 1, 2, 1]), "label 2.*initial='value'"), (torch.tensor([[-1], [1], [1], [-1]]), 'label -1'),
    (torch.zeros(4, 2), r'\(4, 2\).*0 or 1'), (torch.tensor([0.0, float('nan'), 1.0, 1.0]), 'not finite'),
    (None, "no labels.*initial='value'")])
def test_labels_that_do_not_fit_a_column(target: Any, message: str) -> None:
    for criterion in ('relevance', 'taylor'):
        with pytest.raises(zp.PruneError, match=message):
            collected(pruner(single()), x(), target, criterion=criterion)


def test_a_regression_starts_at_its_value() -> None:
    for outputs in (1, 3):
        tool, target = pruner(single(outputs)), torch.randn(4, outputs, dtype=torch.float64)
        with pytest.raises(zp.PruneError, match=r"regression.*initial='value'"):
            collected(tool, x(), target)
        found = collected(tool, x(), target, initial='value')
        assert same(found, collected(tool, x(), None, initial=lambda output: output))
        assert same(found, tool.collect([x()], initial='value', progress=False))


def test_real_numbers_are_weights_by_name_only() -> None:
    tool, rows = pruner(single(3)), torch.rand(4, 3, dtype=torch.float64)
    with pytest.raises(zp.PruneError, match=r"\(4, 3\).*other values than 0 and 1.*initial='weights'"):
        collected(tool, x(), rows)
    assert same(collected(tool, x(), rows, initial='weights'), collected(tool, x(), lambda output: rows))
    with pytest.raises(zp.PruneError, match=r"'weights' takes the relevance at the output.*\(4, 3\).*\(4,\)"):
        collected(tool, x(), labels() % 3, initial='weights')
    with pytest.raises(zp.PruneError, match=r"'weights' takes.*'predicted'"):
        collected(tool, x(), 'predicted', initial='weights')
    with pytest.raises(zp.PruneError, match=r'other values than 0 and 1.*filled up with -1'):
        collected(tool, x(), torch.tensor([[0, 2, -1]] * 4))


def test_losses_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(4, 3, generator=generator).double().requires_grad_()
    soft, several = torch.rand(4, 3, generator=generator).double().softmax(1), torch.tensor([[1, 0, 1]] * 3 + [[0] * 3])
    for rows, initial, loss in ((soft, 'cross-entropy', F.cross_entropy),
                                (several, 'binary-cross-entropy', F.binary_cross_entropy_with_logits),
                                (soft, 'binary-cross-entropy', F.binary_cross_entropy_with_logits)):
        total = loss(output, rows.double(), reduction='sum')
        assert apart(initial_relevance(output, rows, initial), torch.autograd.grad(total, output)[0]) <= 1e-12
    with pytest.raises(zp.PruneError, match=r"several labels for one sample.*'binary-cross-entropy'"):
        initial_relevance(output, several, 'cross-entropy')
    assert collected(pruner(single(3)), x(), several, criterion='taylor',
                     initial='binary-cross-entropy').info['samples'] == 4


@pytest.mark.parametrize('target', [{'boxes': torch.zeros(4, 4)}, [{'labels': torch.zeros(1)}] * 4])
def test_targets_that_are_no_labels_ask_for_a_start(target: Any) -> None:
    with pytest.raises(zp.PruneError, match=r"no tensor of labels.*target='predicted'.*initial=.*detections"):
        initial_relevance(torch.zeros(4, 3), target, 'one-hot')
    assert initial_relevance(torch.zeros(4, 3), target, lambda output: output + 1).sum() == 12


# --- errors
def _collect(target: Any, **options: Any) -> zp.Relevance:
    return zp.Pruner(chain(), composite(), images()).collect([(images(), target)], progress=False, **options)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    'class among several out of range': (lambda: _collect(torch.tensor([[0, 1]] * 3 + [[2, 4]])), 'label 4.*4 classes'),
    'class given twice': (lambda: _collect(torch.tensor([[0, 1]] * 3 + [[2, 2]])), r'\(4, 2\).*class 2 twice'),
    'several as real numbers': (lambda: _collect(torch.zeros(4, 2)), r'\(4, 2\).*float32'),
    'no target at all': (lambda: _collect(torch.full((4, 2), -1)), 'none of 4 has a target'),
    'a missing label': (lambda: _collect(torch.tensor([0, -1, 1, 2])), 'label -1'),
    'two functions': (
        lambda: _collect(torch.sigmoid, initial=torch.sigmoid),
        'both target and initial are functions.*give one',
    ),
    'unknown class': (lambda: _collect(labels(), classes=(3, 9)), r'class 9.*\(3, 9\).*0 to 3'),
    'no class': (lambda: _collect(labels(), classes=()), 'empty'),
    'a negative class': (lambda: _collect(labels(), classes=(-1, 2)), 'out of range'),
    'a number as classes': (lambda: _collect(labels(), classes=3), r'classes=3.*classes=\(3, 5\)'),
    'names as classes': (lambda: _collect(labels(), classes=('cat',)), 'cat'),
    'no sample of the classes': (lambda: _collect(labels() * 0, classes=(2, 3)), r'none of 4.*\(2, 3\)'),
    'one class and a rival': (lambda: _collect(labels(), classes=(2,), initial='contrastive'), 'second class'),
    'classes of a function': (lambda: _collect(None, classes=(2,), initial=torch.sigmoid), 'label'),
    'nonfinite': (lambda: _collect(labels(), nonfinite='ignore'), "'ignore'.*'error', 'skip'"),
}


@pytest.mark.parametrize('kind', BAD)
def test_bad_targets(kind: str) -> None:
    action, message = BAD[kind]
    with pytest.raises(zp.PruneError, match=message):
        action()


# --- other criteria
@pytest.mark.parametrize('criterion', ['gradient', 'taylor', 'taylor-weights', 'activation', 'wanda'])
def test_criteria_take_classes_and_leave_samples_out(criterion: str) -> None:
    tool, inputs, target = pruner(), x(8), labels(8)
    expected = collected(tool, inputs[[1, 3, 5]], target[[1, 3, 5]], criterion=criterion)
    inputs[7] = float('nan')
    with pytest.warns(zp.PruneWarning, match='1 of 8 samples'):
        found = collected(tool, inputs, target, criterion=criterion, classes=(1, 3), nonfinite='skip')
    assert same(found, expected) and found.info['samples'] == 3


@pytest.mark.parametrize('criterion', ['gradient', 'taylor', 'taylor-weights'])
def test_criteria_of_gradients_take_several_targets(criterion: str) -> None:
    tool, options = pruner(), {'criterion': criterion}
    target = torch.tensor([[0, 3], [2, -1], [3, 1], [1, 0]])
    found = collected(tool, x(), target, **options)
    samples = [
        mean(*(collected(tool, x()[[row]], torch.tensor([label]), **options) for label in target[row] if label >= 0))
        for row in range(4)
    ]
    assert same(found, {name: torch.stack([sample[name] for sample in samples]).mean(0) for name in found})


def test_cross_entropy_of_a_mask_is_the_mean_over_its_pixels() -> None:
    output = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    mask = torch.randint(0, 4, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    mask[0, 1:] = 255
    loss = sum(F.cross_entropy(output[[row]], mask[[row]], ignore_index=255) for row in range(2))
    assert apart(initial_relevance(output, mask, 'cross-entropy'), torch.autograd.grad(loss, output)[0]) <= 1e-12


def test_criteria_with_formulas_take_no_attributor_and_activations_need_labels_for_classes() -> None:
    with pytest.raises(zp.PruneError, match=r"attributor.*'taylor'"):
        collected(pruner(), x(), labels(), criterion='taylor', attributor=SmoothGrad)
    with pytest.raises(zp.PruneError, match='needs a label for each sample'):
        collected(pruner(), x(), 'predicted', criterion='activation', classes=(1, 2))
