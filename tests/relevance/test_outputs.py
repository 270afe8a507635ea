'''Which of a network's outputs relevance starts from, and which of its dimensions holds the classes.'''
from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import apart, composite, images, labels, seeded
from torch import nn
from torch.nn import functional as F

import zennit_prune as zp
from zennit_prune.relevance._outputs import chosen_output, class_dimension, classes_back, classes_second

BOXES, SCORES = torch.zeros(4, 3), torch.ones(4, 5)
Pair = namedtuple('Pair', 'boxes scores')


class Heads(nn.Module):
    '''Boxes and scores, each behind channels of its own, returned as ``form`` makes them.'''

    def __init__(self, form: Callable[[torch.Tensor, torch.Tensor], Any]):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, padding=1)
        self.near, self.far = nn.Conv2d(6, 5, 3), nn.Conv2d(6, 7, 3)
        self.boxes, self.scores, self.form = nn.Linear(5, 4), nn.Linear(7, 4), form

    def forward(self, x: torch.Tensor) -> Any:
        x = F.relu(self.body(x))
        near, far = (F.relu(branch(x)).mean((2, 3)) for branch in (self.near, self.far))
        return self.form(self.boxes(near), self.scores(far))


def heads(form: Callable[[torch.Tensor, torch.Tensor], Any]) -> nn.Module:
    return seeded(Heads(form)).eval()


# --- the tensor
FOUND: dict[str, tuple[Any, Any]] = {
    'alone': (SCORES, None),
    'index': ((BOXES, SCORES), 1),
    'negative index': ([BOXES, SCORES], -1),
    'key': ({'boxes': BOXES, 'scores': SCORES}, 'scores'),
    'attribute': (SimpleNamespace(boxes=BOXES, scores=SCORES), 'scores'),
    'key that is a number': ({0: BOXES, 1: SCORES}, 1),
    'field of a tuple': (Pair(BOXES, SCORES), 'scores'),
    'function': (([BOXES], {'a': SCORES}), lambda returned: returned[1]['a']),
    'logits': ({'loss': torch.ones(()), 'boxes': BOXES, 'logits': SCORES}, None),
    'logits of an object': (SimpleNamespace(hidden=BOXES, logits=SCORES), None),
    'out': (OrderedDict(aux=BOXES, out=SCORES), None),
    'any mapping': (UserDict(boxes=BOXES, logits=SCORES), None),
    'the only tensor': ((None, SCORES), None),
    'the only one that is no loss': ({'loss': torch.ones(()), 'scores': SCORES, 'count': torch.ones(4).long()}, None),
    'the only tensor of a part': ({'a': BOXES, 'b': [SCORES]}, 'b'),
    'one tensor twice': ((SCORES, SCORES), None),
}


@pytest.mark.parametrize('case', FOUND)
def test_the_output_that_is_chosen(case: str) -> None:
    returned, output = FOUND[case]
    assert chosen_output(returned, output) is SCORES


REFUSED: dict[str, tuple[Any, Any, str]] = {
    'several': ((BOXES, SCORES), None, r'several outputs.*0 \(shape \(4, 3\)\), 1 \(shape \(4, 5\)\).*output=0'),
    'several keys': ({'boxes': BOXES, 'scores': SCORES}, None, r"'boxes' \(shape \(4, 3\)\).*output='scores'"),
    'unknown key': ({'boxes': BOXES, 'scores': SCORES}, 'score', "output='score' is none.*did you mean 'scores'"),
    'no key': ({0: BOXES, 1: SCORES}, 2, 'output=2 is none'),
    'index out of range': ((BOXES,), 1, r'output=1 is none of the outputs.*0 \(shape'),
    'index of a tensor': (SCORES, 0, r'output=0.*a tensor of shape \(4, 5\)'),
    'whole numbers': ((SCORES.long(),), None, 'real numbers'),
    'a loss alone': (torch.ones(()), None, r'a tensor of shape \(\).*a row for each sample'),
    'nothing': (None, None, 'None is no output to start from'),
    'a function of several': ((BOXES, SCORES), lambda returned: returned, 'returns several tensors.*torch.cat'),
    'a function that fails': ((BOXES,), lambda returned: returned[3], 'function given as output= fails.*IndexError'),
    'a function of none': ((BOXES,), lambda returned: 'scores', 'is no output to start from'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_outputs_that_are_refused(case: str) -> None:
    returned, output, message = REFUSED[case]
    with pytest.raises(zp.PruneError, match=message):
        chosen_output(returned, output)


@pytest.mark.parametrize('output', [1.5, True, [1], object()])
def test_what_names_no_output_is_refused_before_data_are_read(output: Any) -> None:
    def unread() -> Any:
        raise AssertionError
        yield

    pruner = zp.Pruner(heads(lambda boxes, scores: scores), None, images(2), progress=False)
    actions = [lambda: pruner.collect(unread(), output=output), lambda: pruner.heatmap(images(2), output=output),
               lambda: pruner.prune(unread(), zp.Budget(channels=0.5), output=output),
               lambda: pruner.preflight(images(2), output=output),
               lambda: zp.heatmap(pruner.model, None, images(2), output=output),
               lambda: zp.agreement(pruner.model, pruner.model, None, images(2), output=output),
               lambda: zp.finetune(pruner.model, unread(), 1, output=output)]
    for action in actions:
        with pytest.raises(zp.PruneError, match='names no output'):
            action()


@pytest.mark.parametrize('form,output', [
    (lambda boxes, scores: (boxes, scores), 1), (lambda boxes, scores: {'boxes': boxes, 'scores': scores}, 'scores'),
    (lambda boxes, scores: {'boxes': boxes, 'logits': scores}, None),
    (lambda boxes, scores: [boxes, [scores]], lambda returned: returned[1][0])])
def test_output_goes_wherever_a_target_goes(form: Callable[..., Any], output: Any) -> None:
    several, alone = heads(form), heads(lambda boxes, scores: scores)
    x, target = images(4), labels()
    one, other = (zp.Pruner(model, composite(), x, progress=False) for model in (alone, several))
    with pytest.warns(zp.PruneWarning, match='no relevance arrives at near: these channels .*are kept'):
        found = other.collect([(x, target)], output=output)
    expected = one.collect([(x, target)])
    assert 'near' not in found and 'near' not in other.plan(found, zp.Budget(channels=0.8)).removed
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found.info.get('output') == (output if output is None or isinstance(output, (int, str)) else '<lambda>')
    assert torch.equal(other.heatmap(x, target, output=output), one.heatmap(x, target))
    assert torch.equal(other.heatmap(x, target, channel=('far', 2), output=output),
                       one.heatmap(x, target, channel=('far', 2)))
    assert torch.equal(zp.heatmap(several, composite(), x, output=output), zp.heatmap(alone, composite(), x))
    assert other.preflight(x, target, output=output).stages == one.preflight(x, target).stages
    assert zp.agreement(several, several, composite(), x, output=output).same.all()
    trained = [zp.finetune(model, (x, target), 1, output=given, progress=False)
               for model, given in ((several, output), (alone, None))]
    assert all(map(torch.equal, trained[0].parameters(), trained[1].parameters()))
    with pytest.warns(zp.PruneWarning, match='no relevance arrives at near'):
        result = other.prune([(x, target)], zp.Budget(channels=0.8), output=output)
    assert result.model.near.out_channels == 5


def test_a_report_names_its_output(tmp_path: Any) -> None:
    pruner = zp.Pruner(heads(lambda boxes, scores: (boxes, scores)), None, images(2), progress=False)
    plan = zp.Plan(pruner.graph, {'far': [1]})
    with pytest.raises(zp.PruneError, match='output='):
        zp.report(pruner, plan, x=images(2), path=tmp_path / 'report.html')
    zp.report(pruner, plan, x=images(2), path=tmp_path / 'report.html', output=1)
    assert (tmp_path / 'report.html').exists()


def test_collectors_of_different_outputs_are_not_added_up() -> None:
    pruner = zp.Pruner(heads(lambda boxes, scores: (boxes, scores)), None, images(2), progress=False)
    with pytest.raises(zp.PruneError, match='differ in output: 0 and 1'):
        with pruner.collector(output=0) as one, pruner.collector(output=1) as other:
            one.update(images(4), labels())
            other.update(images(4), labels())
        one.merge(other)


def test_every_channel_may_be_out_of_reach() -> None:
    pruner = zp.Pruner(heads(lambda boxes, scores: (boxes.detach(), scores)), None, images(2), progress=False)
    with pytest.raises(zp.PruneError, match=r'computed without gradients.*output='):
        pruner.collect([(images(4), labels())], output=0)


def test_a_branch_that_is_multiplied_by_zero_is_kept() -> None:
    pruner = zp.Pruner(heads(lambda boxes, scores: scores + 0 * boxes), composite(), images(2), progress=False)
    with pytest.warns(zp.PruneWarning, match='no relevance arrives at near'):
        relevance = pruner.collect([(images(4), labels())])
    assert set(relevance) == {'body', 'far'} and 'near' in str(relevance.info['notes'])


# --- the dimension of the classes
OUTPUT = torch.zeros(2, 5, 7)
DIMENSIONS: dict[str, tuple[Any, int | None]] = {
    'one class each': ((torch.zeros(2, 5), torch.zeros(2).long()), 1),
    'a column without a dimension': ((torch.zeros(2), torch.zeros(2).long()), None),
    'labels of tokens': ((OUTPUT, torch.zeros(2, 5).long()), 2),
    'labels of positions': ((OUTPUT, torch.zeros(2, 7).long()), 1),
    'masks': ((torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5).long()), 1),
    'masks of channels last': ((torch.zeros(2, 4, 5, 3), torch.zeros(2, 4, 5).long()), 3),
    'one column per token': ((torch.zeros(2, 5, 1), torch.zeros(2, 5).long()), 2),
    'rows of tokens': ((OUTPUT, F.one_hot(torch.zeros(2, 5).long(), 7)), 2),
    'rows of positions': ((OUTPUT, F.one_hot(torch.zeros(2, 7).long(), 5).mT), 1),
    'masks of a column': ((torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)), 1),
    'masks with a dimension more': ((torch.zeros(2, 4, 4), torch.zeros(2, 1, 4, 4)), None),
    'masks without a dimension': ((torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), torch.zeros(2, 3, 4, 4)), None),
    'predicted per pixel': ((torch.zeros(2, 9, 4, 5), 'predicted', torch.zeros(2, 3, 4, 5)), 1),
    'predicted per token number': ((OUTPUT, 'predicted', torch.zeros(2, 5).long()), 2),
    'predicted, grey images': ((torch.zeros(2, 1, 4, 5), 'predicted', torch.zeros(2, 1, 4, 5)), 1),
    'predicted, as many classes as colours': ((torch.zeros(2, 3, 4, 5), 'predicted', torch.zeros(2, 3, 4, 5)), 1),
    'predicted by a head without flatten': ((torch.zeros(2, 5, 1, 1), 'predicted', torch.zeros(2, 3, 8, 8)), 1),
    'predicted per pixel, channels last': ((torch.zeros(2, 4, 5, 9), 'predicted', torch.zeros(2, 4, 5, 3)), 3),
    'as large as classes, channels last': ((torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4).long(),
                                            torch.zeros(2, 4, 4, 3)), 3),
    'rows of one token': ((torch.zeros(2, 1, 7), F.one_hot(torch.zeros(2, 1).long(), 7), torch.zeros(2, 1).long()), 2),
    'rows of a line': ((torch.zeros(2, 4, 5, 1), F.one_hot(torch.zeros(2, 5, 1).long(), 4).movedim(-1, 1)), 1),
    'predicted, told by labels': ((OUTPUT, 'predicted', torch.zeros(2, 3, 8, 8), torch.zeros(2, 5).long()), 2),
    'labels of both, from a function': ((torch.zeros(2, 5, 5), torch.zeros(2, 5).long(), None, None, True), 1),
    'predicted per token number, words second': ((OUTPUT, 'predicted', torch.zeros(2, 7).long()), 1),
    'masks with a dimension of channels': ((torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 4, 5).long()), 1),
    'as many tokens as words, told by inputs': ((torch.zeros(2, 5, 5), torch.zeros(2, 5).long(),
                                                 torch.zeros(2, 5, 4)), 2),
    'as high as classes': ((torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4).long()), 1),
}


@pytest.mark.parametrize('case', DIMENSIONS)
def test_the_dimension_of_the_classes(case: str) -> None:
    arguments, dim = DIMENSIONS[case]
    assert class_dimension(*arguments) == dim


@pytest.mark.parametrize('given', [False, True])
@pytest.mark.parametrize('shape,inputs', [
    ((2, 85, 8400), (2, 3, 64, 64)), ((2, 25200, 85), (2, 3, 64, 64)), ((2, 24, 8, 8), (2, 3, 64, 64)),
    ((2, 100, 92), (2, 3, 32, 32)), ((2, 5, 5), (2, 7)), ((2, 24, 8, 8), (2, 16, 8, 8)), ((2, 6, 7), (2, 6, 5))])
def test_numbers_of_boxes_are_no_classes(shape: tuple[int, ...], inputs: tuple[int, ...], given: bool) -> None:
    with pytest.raises(zp.PruneError, match=r'cannot be told: give labels.*detections\(\.\.\.\).*initial=') as error:
        class_dimension(torch.zeros(shape), 'predicted', torch.zeros(inputs), None, given)
    output = torch.randn(2, 3, 4)
    start = eval(str(error.value).split('initial=')[-1].removesuffix('.'), {'torch': torch})(output)
    assert torch.equal(start, F.one_hot(output.argmax(1), 3).movedim(-1, 1).float())


def test_as_many_tokens_as_words_are_refused_without_inputs_that_tell() -> None:
    for inputs in (torch.zeros(2, 3, 8, 8), torch.zeros(2, 5).long(), None):
        with pytest.raises(zp.PruneError, match=r'labels fit several.*out if they are there.*movedim\(2, 1\)'):
            class_dimension(torch.zeros(2, 5, 5), torch.zeros(2, 5).long(), inputs)


@pytest.mark.parametrize('dim', [None, 1, 2, 3])
def test_there_and_back(dim: int | None) -> None:
    output = torch.randn(2, 3, 4, 5)
    assert torch.equal(classes_back(classes_second(output, dim), dim), output)


class Tagger(nn.Module):
    '''Token numbers to scores of words for each token; ``second`` puts the words before the tokens.'''

    def __init__(self, second: bool = False):
        super().__init__()
        self.embedding, self.conv, self.out = nn.Embedding(9, 6), nn.Conv1d(6, 8, 3, padding=1), nn.Linear(8, 9)
        self.second = second

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(self.embedding(tokens).transpose(1, 2))).transpose(1, 2)
        return self.out(x).transpose(1, 2) if self.second else self.out(x)


@pytest.mark.parametrize('initial', ['one-hot', 'logit', 'softmax', 'contrastive', 'cross-entropy'])
@pytest.mark.parametrize('target', ['labels', 'rows', 'predicted'])
def test_words_last_equal_words_second(initial: str, target: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, words = (torch.randint(0, 9, (3, 5), generator=generator) for _ in range(2))
    words[0, :3] = -100
    last, second = (zp.Pruner(seeded(Tagger(order)).double(), None, tokens, progress=False) for order in (False, True))
    rows = F.one_hot(words.clamp(min=0), 9) * (words >= 0).unsqueeze(2)
    given: dict[str, tuple[Any, Any]] = {'labels': (words, words), 'rows': (rows, rows.mT),
                                         'predicted': ('predicted', 'predicted')}
    found = last.collect([(tokens, given[target][0])], initial=initial)
    expected = second.collect([(tokens, given[target][1])], initial=initial)
    assert apart(found['conv'], expected['conv']) <= 1e-10
    if target == 'predicted':  # in place of labels, which tell where the words are
        assert apart(found['conv'], last.collect([(tokens, words)], initial=initial, target='predicted')['conv']) == 0


def test_finetune_learns_tokens_and_single_columns() -> None:
    tokens = torch.randint(0, 9, (8, 5), generator=torch.Generator().manual_seed(0))
    losses: list[float] = []
    column = [Tagger(), nn.Flatten(), nn.Linear(45, 1)]
    for model, target in ((Tagger(), tokens), (nn.Sequential(*column), tokens[:, 0] % 2),
                          (nn.Sequential(*column, nn.Flatten(0)), tokens[:, 0] % 2)):
        zp.finetune(seeded(model), [(tokens, target)], 30, lr=0.1, progress=False,
                    callback=lambda epoch: losses.append(epoch['loss']))
        assert losses[-1] < losses[0]
        losses.clear()


@pytest.mark.parametrize('end', [nn.Sigmoid, lambda: nn.Sequential(nn.Sigmoid(), nn.Flatten(0)),
                                 lambda: nn.Sequential(nn.Identity(), nn.Sigmoid(), nn.Dropout())])
@pytest.mark.parametrize('rules', [composite, lambda: None])
def test_half_parts_the_classes_of_a_sigmoid(end: Callable[[], nn.Module], rules: Callable[[], Any]) -> None:
    layers = [nn.Conv2d(3, 6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(6, 1)]
    model, x = seeded(nn.Sequential(*layers, end())).eval(), images(6)
    logits = model[:4](x)
    with torch.no_grad():
        model[3].bias -= logits.median()
    found = zp.agreement(model, model, rules(), x, labels(6) % 2)
    assert 0 < found.predicted[0].sum() < 6
    assert torch.equal(found.predicted[0].reshape(-1), (model(x) >= 0.5).long().reshape(-1))
    if model(x).dim() == 2:
        assert torch.equal(zp.heatmap(model, rules(), x), zp.heatmap(model, rules(), x, found.predicted[0]))
