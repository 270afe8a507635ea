'''Loaders as public code has them: every form in ``docs/loaders.md`` works at every entrance, or after a line of code.

The structures are built by hand; those of libraries that are installed are in slow tests.
'''
from __future__ import annotations

import re
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import chain, images, labels, seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import zennit_prune as zp
from zennit_prune.util._arguments import call_network
from zennit_prune.util._loaders import Batch

PAGE = (Path(__file__).parents[2] / 'docs' / 'loaders.md').read_text()
X, Y = images(6), labels(6)
BUDGET = zp.Budget(flops=0.7)
Sample = namedtuple('Sample', 'image label index path')


class Text(nn.Module):
    '''A classifier of texts, as Hugging Face calls them.'''

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.hidden = nn.Embedding(20, 12), nn.Linear(12, 16)
        self.act, self.head = nn.ReLU(), nn.Linear(16, 4)

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        x = self.act(self.hidden(self.embeddings(input_ids)))
        x = x if attention_mask is None else x * attention_mask.unsqueeze(-1)
        logits = self.head(x.mean(1))
        return logits if labels is None else (F.cross_entropy(logits, labels), logits)


class Listed(nn.Module):
    '''A network that pads images of different sizes, as detectors do; of images, or of detectron2's dicts.'''

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, batched_inputs: Any) -> Any:
        found = [item['image'] if isinstance(item, dict) else item for item in batched_inputs]
        high, wide = (max(image.shape[dim] for image in found) for dim in (1, 2))
        x = torch.stack([F.pad(image, (0, wide - image.shape[2], 0, high - image.shape[1])) for image in found])
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


class Dense(nn.Module):
    '''A network for segmentation.'''

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Any) -> Any:
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


TOKENS, MASK = torch.arange(36).view(6, 6) % 20, torch.ones(6, 6)
SIZED = [image[:, number % 3:] for number, image in enumerate(X)]
BOXES = [{'boxes': torch.rand(number % 3, 4), 'labels': torch.arange(number % 3)} for number in range(6)]
COCO = [[{'bbox': [0.0, 1.0, 2.0, 3.0], 'category_id': 3}] * (number % 3) for number in range(6)]
TARGETS = {'boxes': [each['boxes'] for each in BOXES]}
PREDICTED = {'target': 'predicted'}

# by the row of the page: the network, a batch, options, and the code on the page that wraps the loader, if any
FORMS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    'ImageFolder': (chain, [X, Y], {}, ''),
    'VOCSegmentation': (Dense, [X, torch.arange(384).view(6, 8, 8) % 4], {}, ''),
    'CocoDetection': (Listed, (tuple(SIZED), tuple(COCO)), PREDICTED, ''),
    'detection references': (Listed, (tuple(SIZED), tuple(BOXES)), {'initial': torch.ones_like}, ''),
    'images and a target dict': (chain, (X, TARGETS), PREDICTED, ''),
    "with_format('torch')": (chain, {'image': X, 'label': Y}, {}, ''),
    'AutoImageProcessor': (chain, UserDict(pixel_values=X, labels=Y), {}, ''),
    'BatchEncoding': (Text, UserDict(input_ids=TOKENS, attention_mask=MASK, labels=Y), {}, ''),
    'DataCollatorWithPadding': (Text, {'input_ids': TOKENS, 'attention_mask': MASK, 'token_type_ids': TOKENS,
                                       'labels': Y}, {},
                                "loader = (({'input_ids': batch['input_ids'], 'attention_mask': batch['attention_mask']"
                                "}, batch['labels']) for batch in loader)"),
    'three tensors': (Text, [TOKENS, MASK, Y], {}, 'loader = (((input_ids, attention_mask), y) for input_ids, '
                                                   'attention_mask, y in loader)'),
    'MONAI': (chain, {'image': X, 'label': Y}, {}, ''),
    'MONAI with metadata': (chain, {'image': X, 'label': Y, 'image_meta_dict': {'affine': torch.eye(4)}}, {},
                            "loader = ((batch['image'], batch['label']) for batch in loader)"),
    'torchgeo': (Dense, {'image': X, 'mask': torch.arange(384).view(6, 8, 8) % 4, 'crs': ['EPSG:4326'] * 6}, {},
                 "loader = ((batch['image'], batch['mask']) for batch in loader)"),
    'CombinedLoader': (chain, ((X, Y), 0, 0), {}, 'loader = (batch for batch, *_ in loader)'),
    'a dict of loaders': (chain, {'a': [X, Y], 'b': [X, Y]}, {}, "loader = (batch['a'] for batch in loader)"),
    'timm': (chain, (X, Y), {}, ''),
    'WebDataset': (chain, [X, Y.tolist()], {}, ''),
    'WebDataset with keys': (chain, [X, Y.tolist(), [f'{number:06}' for number in range(6)]], {},
                             'loader = ((x, y) for x, y, _ in loader)'),
    'detectron2': (Listed, [{'image': image, 'height': 480, 'file_name': 'x.png'} for image in SIZED], PREDICTED, ''),
    'an index': (chain, (X, Y, torch.tensor([17, 3, 8, 20, 0, 5])), {}, ''),
    'weights': (chain, (X, Y, torch.rand(6)), {}, 'loader = ((x, y) for x, y, _ in loader)'),
    'named parts': (chain, Sample(X, Y, torch.arange(6), ['x'] * 6), {},
                    'loader = ((batch.image, batch.label) for batch in loader)'),
    'mixup': (chain, (X, torch.rand(6, 4).softmax(1)), {'initial': 'weights'}, ''),
    'mixup with pairs of labels': (chain, (X, (Y, Y.flip(0), 0.3)), {'initial': 'weights'},
                                   'loader = ((x, lam * one_hot(a, classes) + (1 - lam) * one_hot(b, classes)) '
                                   'for x, (a, b, lam) in loader)'),
    'NumPy': (chain, (X.numpy(), Y.numpy()), {}, ''),
    'names of classes': (chain, (X, ['cat', 'dog', 'cow', 'cat', 'dog', 'cow']), {},
                         'loader = ((x, torch.tensor([names.index(name) for name in y])) for x, y in loader)'),
    'without collate': (chain, [(x, int(y)) for x, y in zip(X, Y)], {},
                        'loader = map(torch.utils.data.default_collate, loader)'),
}


def network_for(form: str) -> nn.Module:
    return seeded(FORMS[form][0]())


def loader_for(form: str, count: int = 1) -> Any:
    '''A loader of this form, wrapped as the page says.'''
    _, batch, _, code = FORMS[form]
    scope = {'loader': [batch] * count, 'torch': torch, 'one_hot': F.one_hot, 'classes': 4,
             'names': ['cat', 'dog', 'cow']}
    exec(code, scope)
    return scope['loader']


def example_for(form: str) -> Any:
    kind = FORMS[form][0]
    return TOKENS if kind is Text else [SIZED[0], SIZED[1]] if kind is Listed else X[:1]


def test_every_row_of_the_page_is_here() -> None:
    rows = re.findall(r'^\| (?!loader|---)(.+?) \|.*\| (.+?) \|$', PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == list(FORMS) and len(rows) >= 12
    for name, says in rows:
        assert says == (f'`{FORMS[name][3]}`' if FORMS[name][3] else 'works') or (
            says.startswith('works') and not FORMS[name][3]), name


@pytest.mark.parametrize('form', FORMS)
def test_forms_that_work_and_lines_that_wrap_the_others(form: str) -> None:
    model, options, line = network_for(form), FORMS[form][2], FORMS[form][3]
    pruner = zp.Pruner(model, None, example_for(form), progress=False)
    if line:
        with pytest.raises(zp.PruneError, match=re.escape(line)):
            pruner.collect([FORMS[form][1]], **options)
    relevance = pruner.collect(loader_for(form), **options)
    assert all(scores.any() for _, scores in relevance.items())
    result = pruner.prune(loader_for(form), BUDGET, **options)
    assert all(torch.equal(result.relevance[name], relevance[name]) for name in relevance)
    small = zp.prune(model, None, loader_for(form), BUDGET, progress=False, repair='none', **options)
    assert [tensor.shape for tensor in small.parameters()] == [tensor.shape for tensor in result.model.parameters()]


ENTRANCES = ['ImageFolder', 'detection references', 'images and a target dict', 'AutoImageProcessor', 'BatchEncoding',
             'detectron2', 'an index', 'NumPy', 'weights']


@pytest.mark.parametrize('form', ENTRANCES)
def test_every_entrance(form: str) -> None:
    model, options = network_for(form), FORMS[form][2]
    pruner = zp.Pruner(model, None, example_for(form), progress=False)
    relevance = pruner.collect(loader_for(form), **options)
    result = pruner.iterate(loader_for(form, 2), BUDGET, step=0.2, repair='bias', **options)  # a generator is held
    assert len(result.history) > 2
    plan = pruner.plan(relevance, BUDGET)
    small = plan.apply(model)
    zp.repair(model, small, plan, loader_for(form), progress=False)
    tuned = zp.finetune(small, loader_for(form, 2), 1, teacher=model, progress=False)
    assert not any(torch.equal(*pair) for pair in zip(tuned.parameters(), small.parameters()))
    found = zp.sweep(pruner, loader_for(form), lambda network: 1.0, [BUDGET], ['relevance', 'l1'], progress=False,
                     collect=options)
    assert 'relevance' in str(found)


@pytest.mark.parametrize('form', ENTRANCES[:3] + ENTRANCES[4:6])
def test_collectors_checkpoints_and_choices(form: str, tmp_path: Path) -> None:
    model, options = network_for(form), FORMS[form][2]
    pruner = zp.Pruner(model, None, example_for(form), progress=False)
    wanted = pruner.collect(loader_for(form, 2), **options)
    inputs, target = loader_for(form)[0] if not isinstance(FORMS[form][1], (UserDict, dict)) and form != 'detectron2' \
        else (loader_for(form)[0], None)
    with pruner.collector(initial=options.get('initial', 'auto')) as collector:
        for _ in range(2):
            collector.update(inputs, options.get('target', target))
    assert all(torch.equal(scores, wanted[name]) for name, scores in collector.compute().items())

    def interrupted() -> Iterator[Any]:
        yield loader_for(form)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruner.collect(interrupted(), checkpoint=tmp_path / 'collect', **options)
    resumed = pruner.collect(loader_for(form, 2), checkpoint=tmp_path / 'collect', **options)
    assert all(torch.equal(resumed[name], wanted[name]) for name in wanted)
    assert pruner.prune(loader_for(form, 2), BUDGET, criterion='auto', **options).choice is not None


def test_heatmaps_of_batches() -> None:
    model = chain()
    wanted = zp.heatmap(model, None, X)
    for x in ({'image': X}, UserDict(image=X, label=Y), X.numpy(), (X,)):
        assert torch.equal(zp.heatmap(model, None, x), wanted)
        assert zp.agreement(model, model, None, x).cosine.tolist() == [1.0] * 6
    assert torch.equal(zp.heatmap(model, None, X, Y.tolist()), zp.heatmap(model, None, X, Y))
    assert zp.Pruner(model, None, X, progress=False).preflight({'image': X[:2]}).problems == ()


def test_heatmaps_of_lists_of_samples() -> None:
    model = seeded(Listed())
    wanted = zp.heatmap(model, None, list(X))
    assert wanted.shape == (6, 8, 8)
    assert torch.equal(zp.heatmap(model, None, [{'image': image, 'height': 8} for image in X]), wanted)
    parts = zp.heatmap(model, None, list(X), channel=('b', range(16)))
    assert parts.shape == (16, 6, 8, 8) and torch.allclose(parts.sum(0), wanted, atol=1e-5)
    assert torch.allclose(zp.heatmap(model, None, [X[0]]), wanted[:1], atol=1e-6)
    with pytest.raises(zp.PruneError, match=r'shapes \(3, 8, 8\), \(3, 7, 8\).*one call takes images of one size'):
        zp.heatmap(model, None, [X[0], X[1, :, 1:]])


def test_reports_of_arrays(tmp_path: Path) -> None:
    pytest.importorskip('jinja2')
    model = chain()
    pruner = zp.Pruner(model, None, X, progress=False)
    relevance = pruner.collect([{'image': X, 'label': Y}], exemplars=2)
    plan = pruner.plan(relevance, BUDGET)
    for number, (x, y) in enumerate(((X, Y), (X.numpy(), Y.tolist()))):
        zp.report(pruner, plan, relevance, x, y, tmp_path / f'{number}.html', references=[{'image': x, 'label': y}])
    one, other = ((tmp_path / f'{number}.html').read_text() for number in range(2))
    assert one == other


# --- batches
def test_scores_of_lists_are_those_of_tensors() -> None:
    '''Images of one size in a list are scored as in one tensor, in whatever batches they come.'''

    class Stacked(Dense):
        def forward(self, x: Any) -> Any:
            return super().forward(torch.stack(tuple(x)) if isinstance(x, (list, tuple)) else x).mean((2, 3))

    model = seeded(Stacked())
    pruner = zp.Pruner(model, None, X[:1], progress=False)
    wanted = pruner.prune((X, Y), BUDGET)
    loaders = [[(list(X), Y)], [(list(X[:4]), Y[:4]), (list(X[4:]), Y[4:])], [([x], y[None]) for x, y in zip(X, Y)]]
    for loader in loaders:
        found = pruner.prune(loader, BUDGET)
        assert found.plan.removed == wanted.plan.removed
        for name, scores in wanted.relevance.items():
            assert torch.allclose(found.relevance[name], scores, rtol=1e-5)


class Looping(nn.Module):
    '''A network that calls a function, or a module, once for each sample, and the function once more behind.'''

    def __init__(self, loop: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.loop = loop
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 4)

    def forward(self, samples: Any) -> Any:
        x = torch.stack([self.loop(self, image) for image in samples])
        x = F.relu(self.a(x) if x.shape[1] == 3 else x)
        return self.fc((x + self.c(F.relu(self.b(x)))).mean((2, 3)))


LOOPS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    'a function that comes again': (lambda net, image: image + image, "calls add in 'forward'"),
    'a layer': (lambda net, image: net.a(image), "calls module 'a'"),
    'a function that does not': (lambda net, image: F.pad(image, (1, 1, 1, 1)), ''),
}


@pytest.mark.parametrize('kind', LOOPS)
def test_calls_for_each_sample(kind: str) -> None:
    loop, message = LOOPS[kind]
    model = seeded(Looping(loop))
    pruner = zp.Pruner(model, None, [X[0]], progress=False)
    wanted = pruner.collect([(list(X[number:number + 2]), Y[number:number + 2]) for number in range(0, 6, 2)])
    for loader in ([(list(X), Y)], [(list(X[:2]), Y[:2]), ([X[2]], Y[2:3])]):
        if message:
            with pytest.raises(zp.PruneError, match=f'{message} once for each sample.*batch_size=2'):
                pruner.collect(loader)
        else:
            pruner.collect(loader)
    if not message:
        found = pruner.collect([(list(X), Y)])
        assert all(torch.allclose(found[name], wanted[name], rtol=1e-5) for name in wanted)
        assert not any('unsound' in note for note in found.info['notes'])


def test_samples_that_are_not_finite_in_lists() -> None:
    model = seeded(Listed())
    pruner = zp.Pruner(model, None, list(SIZED), progress=False)
    broken = [{'image': image.clone()} for image in X]
    broken[2]['image'][0, 0, 0] = float('nan')
    with pytest.raises(zp.PruneError, match=r'sample 2 of the stream.*not finite'):
        pruner.collect([(broken, Y)])
    relevance = pruner.collect([(broken, Y)], nonfinite='skip')
    wanted = pruner.collect([([{'image': image} for number, image in enumerate(X) if number != 2],
                              Y[torch.arange(6) != 2])])
    assert all(torch.allclose(relevance[name], wanted[name], rtol=1e-5) for name in wanted)
    assert pruner.collect([(broken[:2], Y[:2])], classes=(1,)).info['samples'] == 1


def test_batches_of_different_sizes_and_empty_ones() -> None:
    pruner = zp.Pruner(chain(), None, X[:1], progress=False)
    wanted = pruner.collect([(X, Y)])
    for loader in ([(X, Y), (X[:0], Y[:0])], [{'image': X, 'label': Y}, {'image': X[:0], 'label': Y[:0]}],
                   [(X[:0], Y[:0]), (X, Y)]):
        assert all(torch.equal(scores, wanted[name]) for name, scores in pruner.collect(loader).items())
    pruner.prune([(X, Y), (images(2, 12), Y[:2])], BUDGET)
    with pytest.raises(zp.PruneError, match=r'first batch of the loader is empty.*if len\(x\)\)'):
        zp.prune(chain(), None, [(X[:0], Y[:0]), (X, Y)], BUDGET, progress=False)
    with pytest.raises(zp.PruneError, match='a TensorDataset does not'):
        pruner.collect(TensorDataset(X, Y))


def test_targets_that_are_no_labels_are_refused_by_name() -> None:
    pruner = zp.Pruner(chain(), None, X[:1], progress=False)
    for target in (TARGETS, BOXES):
        with pytest.raises(zp.PruneError, match=r"'boxes': .*no tensor of labels.*target='predicted' or initial="):
            pruner.collect([(X, target)])
        with pytest.raises(zp.PruneError, match='no tensor of labels'):
            pruner.collect([(X, target)], classes=(1, 2), initial=torch.ones_like)
    with pytest.raises(zp.PruneError, match='no tensor of labels'):
        zp.finetune(chain(), [(X, TARGETS)], 1, progress=False)


@pytest.mark.parametrize('convert', [torch.Tensor.int, torch.Tensor.byte, lambda y: y[:, None], torch.Tensor.tolist])
def test_labels_of_any_kind_are_learned(convert: Callable[[torch.Tensor], Any]) -> None:
    wanted, found = (zp.finetune(chain(), [(X, y)], 2, progress=False) for y in (Y, convert(Y)))
    assert all(torch.equal(*pair) for pair in zip(wanted.parameters(), found.parameters()))


# --- with the libraries themselves
@pytest.mark.slow
def test_transformers() -> None:
    transformers = pytest.importorskip('transformers')
    encoding = transformers.BatchEncoding({'input_ids': TOKENS, 'attention_mask': MASK, 'labels': Y})
    model = seeded(Text())
    pruner = zp.Pruner(model, None, encoding, progress=False)
    assert torch.equal(pruner.collect([encoding])['hidden'], pruner.collect([dict(encoding)])['hidden'])


@pytest.mark.slow
def test_monai() -> None:
    data = pytest.importorskip('monai.data')
    loader = data.DataLoader([{'image': x, 'label': int(y)} for x, y in zip(X, Y)], batch_size=6)
    model = chain()
    pruner = zp.Pruner(model, None, X[:1], progress=False)
    assert torch.equal(pruner.collect(loader)['0'], pruner.collect([(X, Y)])['0'])
    zp.prune(model, None, loader, BUDGET, progress=False)


@pytest.mark.slow
def test_torchvision() -> None:
    detection = pytest.importorskip('torchvision.models.detection')
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None).eval()
    loader = DataLoader(list(zip(SIZED, BOXES)), 2, collate_fn=lambda batch: tuple(zip(*batch)))
    for value in loader:
        batch = Batch.of(value, model)
        assert isinstance(batch.inputs, list) and batch.size == len(batch.target) == 2
        found = call_network(model, batch.inputs)
        assert len(found) == 2 and set(found[0]) == {'boxes', 'labels', 'scores'}
