'''Nothing forgets the device: what makes tensors names one, and the main job runs where nothing may be mixed.

Beside the code, this is shown on a device that is pretended (see ``pretended.py``), where there is no GPU.
'''
from __future__ import annotations

import ast
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import main_job
import pretended
import pytest
import torch
from torch import nn

import zennit_prune
import zennit_prune as zp
from zennit_prune.planning._workload import Like
from zennit_prune.repairs._lockstep import Lockstep
from zennit_prune.util._isolation import unrounded

PACKAGE = Path(zennit_prune.__file__).parent
FACTORIES = {'arange', 'as_tensor', 'asarray', 'empty', 'empty_permuted', 'empty_strided', 'eye', 'full', 'linspace',
             'logspace', 'normal', 'ones', 'rand', 'randint', 'randn', 'randperm', 'range', 'scalar_tensor', 'tensor',
             'tril_indices', 'triu_indices', 'zeros'}

# by file and function: why what is made of an array of NumPy's stays on the CPU
FROM_NUMPY = {
    'cli/_demo.py load_digits': 'the data of the demo, which runs on the CPU',
    'planning/_carry.py scores_for_original': 'scores, which are on the CPU',
    'relevance/_criteria.py _averaged': 'indexes weights that were moved to the CPU',
    'relevance/_criteria.py _weights_read': 'indexes weights that were moved to the CPU',
    'relevance/_exemplars.py _places': 'moved where it is used',
    'relevance/_exemplars.py _unravelled': 'exemplars, which are on the CPU',
    'relevance/_sites.py _site': 'positions, moved where they are used',
    'tracing/_operations.py _run_on': 'labels, on which the operation itself is run',
    'tracing/_operations.py index': 'labels, on which the operation itself is run',
}
# and why a tensor that becomes an array is on the CPU
TO_NUMPY = {
    'looking/_pictures.py _bytes': 'pictures, which are on the CPU',
    'looking/_pictures.py heat': 'moved at the start',
    'looking/_pictures.py heatmap_image': 'moved before they are scaled',
    'pipeline/_pruner.py plan': 'scores, which are on the CPU',
    'planning/_carry.py scores_for_original': 'scores, which are on the CPU',
    'relevance/_exemplars.py _places': 'positions, which are on the CPU',
    'relevance/_exemplars.py _unravelled': 'exemplars, which are on the CPU',
    'relevance/_relevance.py _plotted': 'scores, which are on the CPU',
    'relevance/_relevance.py spearman': 'scores, or heatmaps, which are on the CPU',
    'tracing/_operations.py _run_on': 'labels',
    'tracing/_operations.py index': 'labels',
    'util/_isolation.py states': 'the random state of the CPU',
}


def calls(node: ast.AST, function: str = '') -> Iterator[tuple[str, ast.Call]]:
    '''Every call, with the name of the innermost function around it.'''
    if isinstance(node, ast.FunctionDef):
        function = node.name
    if isinstance(node, ast.Call):
        yield function, node
    for child in ast.iter_child_nodes(node):
        yield from calls(child, function)


def called(call: ast.Call) -> str:
    '''``'zeros'`` for ``torch.zeros(...)``; nothing for what is not a function of torch.'''
    named = isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)
    return call.func.attr if named and call.func.value.id == 'torch' else ''  # type: ignore[attr-defined]


def forgetful(tree: ast.AST) -> list[int]:
    '''The lines where a tensor is made on whatever device is the default, or with a generator of another.'''
    found = []
    for _, call in calls(tree):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if called(call) in FACTORIES:
            device = given.get('device')
            on_cpu = isinstance(device, ast.Constant) and device.value == 'cpu'
            if device is None or ('generator' in given and not on_cpu):
                found.append(call.lineno)
    return found


def chain(node: ast.AST) -> Iterator[str]:
    '''The names of the methods that lead to a value, the last first.'''
    while isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr
        node = node.func if isinstance(node, ast.Call) else node.value


FILES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob('*.py'))}


def test_what_makes_a_tensor_names_the_device() -> None:
    assert not [f'{file}:{line}' for file, tree in FILES.items() for line in forgetful(tree)]


@pytest.mark.parametrize('line, wrong', [
    ('torch.zeros(3)', True), ('torch.zeros(3, device=x.device)', False), ("torch.ones(3, device='cpu')", False),
    ('torch.randn(3, generator=g, device=x.device)', True), ("torch.randn(3, generator=g, device='cpu')", False),
    ('x.new_zeros(3)', False), ('torch.zeros_like(x)', False), ('np.zeros(3)', False)])
def test_the_check_itself(line: str, wrong: bool) -> None:
    assert forgetful(ast.parse(line)) == [1] * wrong


def test_arrays_of_numpy_are_moved() -> None:
    '''``torch.from_numpy`` is followed by ``.to(...)``, or known to be for the CPU.'''
    moved = {id(call.func.value) for tree in FILES.values() for _, call in calls(tree)
             if isinstance(call.func, ast.Attribute) and call.func.attr == 'to'}
    found = {f'{file} {function}' for file, tree in FILES.items() for function, call in calls(tree)
             if called(call) == 'from_numpy' and id(call) not in moved}
    assert found == FROM_NUMPY.keys()


def test_tensors_are_moved_before_they_become_arrays() -> None:
    found = {f'{file} {function}' for file, tree in FILES.items() for function, call in calls(tree)
             if isinstance(call.func, ast.Attribute) and call.func.attr in ('numpy', '__array__')
             and 'cpu' not in chain(call.func.value)}
    assert found == TO_NUMPY.keys()


@pytest.fixture
def elsewhere() -> Iterator[torch.device]:
    with pretended.pretending() as device:
        yield device


def test_the_pretended_device_refuses_to_be_mixed(elsewhere: torch.device) -> None:
    x = torch.arange(6.0, device=elsewhere)
    assert x.device == elsewhere and (x * 2).cpu().tolist() == [0, 2, 4, 6, 8, 10]
    for mix in (lambda: x + torch.ones(6), lambda: x.index_select(0, torch.tensor([1])), lambda: x.numpy(),
                lambda: torch.randn(3, generator=torch.Generator(), device=elsewhere) @ torch.ones(3),
                lambda: torch.cat([x, torch.ones(1)]), lambda: torch.linalg.vector_norm(x).add(x).add(torch.ones(6))):
        with pytest.raises((RuntimeError, TypeError)):
            mix()
    assert (x + torch.tensor(1.0)).device == elsewhere  # a number may come from anywhere
    assert x[torch.tensor([1, 2])].tolist() == [1, 2]  # and an index


def test_main_job_where_nothing_may_be_mixed(elsewhere: torch.device, tmp_path: Path) -> None:
    model = main_job.network()
    wanted = main_job.run(deepcopy(model), torch.device('cpu'), tmp_path)
    found = main_job.run(model.to(elsewhere), elsewhere, tmp_path)
    assert found['removed'] == wanted['removed']
    for name, scores in wanted['relevance'].items():
        assert torch.allclose(found['relevance'][name], scores, 1e-3)
    for name, output in wanted['outputs'].items():
        assert torch.allclose(found['outputs'][name], output, 1e-3, 1e-4), name


@pytest.mark.parametrize('options', [
    {'criterion': 'taylor'}, {'criterion': 'taylor-weights'}, {'criterion': 'wanda'}, {'criterion': 'gradient'},
    {'criterion': 'activation', 'classes': (0, 2)}, {'criterion': 'fpgm'}, {'criterion': 'l1'}, {'classes': (0, 2)},
    {'target': 'predicted'}, {'initial': 'contrastive'}, {'initial': 'logit'}, {'nonfinite': 'skip'},
    {'aggregate': 'positive', 'exemplars': 2}], ids=str)
@pytest.mark.parametrize('moved', [False, True])
def test_scores_where_nothing_may_be_mixed(elsewhere: torch.device, options: dict[str, Any], moved: bool) -> None:
    model = main_job.network().eval()
    x, y = main_job.data()
    if 'nonfinite' in options:
        x[3] = torch.nan
    found = []
    for network, batch in ((model, (x, y)), (deepcopy(model).to(elsewhere), (x, y))):
        if moved and network is not model:
            batch = tuple(part.to(elsewhere) for part in batch)
        pruner = zp.Pruner(network, None, x[:1].nan_to_num().to(next(network.parameters()).device), progress=False)
        found.append(pruner.collect(batch, progress=False, **options))
    for name, scores in found[0].items():
        assert torch.allclose(found[1][name], scores, 1e-3)


def test_the_rest_where_nothing_may_be_mixed(elsewhere: torch.device, tmp_path: Path) -> None:
    model = main_job.network().eval().to(elsewhere)
    x, y = main_job.data()
    shown = x[:2].to(elsewhere)
    pruner = zp.Pruner(model, None, shown[:1], progress=False)
    result = pruner.prune((x, y), zp.Budget(flops=0.7), 'auto', progress=False, repair='bias')
    assert pruner.preflight(shown).stages
    name = pruner.graph.groups[0].name
    assert pruner.heatmap(shown, channel=(name, [0, 1])).device.type == 'cpu'
    zp.report(pruner, result.plan, result.relevance, shown, y[:2].to(elsewhere), tmp_path / 'report.html',
              small=result.model, progress=False)
    zp.heatmap_image(shown, {'before': pruner.heatmap(shown)}, tmp_path / 'maps.png')
    tuned = zp.finetune(result.model, (x, y), 1, teacher=model, progress=False)
    assert main_job.devices_of(tuned) == {elsewhere}
    assert zp.latency(model, shown, repeats=1) > 0
    stepped = pruner.iterate((x, y), zp.Budget(flops=0.6), 0.2, progress=False)
    assert main_job.devices_of(stepped.model) == {elsewhere} and len(stepped.history) > 2


def test_bookkeeping_stays_on_the_cpu_whatever_the_default_device(tmp_path: Path) -> None:
    '''A tensor made without a device would be empty here, and one of the CPU's generator would not be made.'''
    model = main_job.network().eval()
    wanted = main_job.run(model, torch.device('cpu'), tmp_path)
    x, y = main_job.data()
    images = list(zip(x.split(8), y.split(8)))
    pruner = zp.Pruner(model, None, x[:1], progress=False)
    with torch.device('meta'):
        relevance = pruner.collect(images, exemplars=2, progress=False)
        plan = pruner.plan(relevance, zp.Budget(flops=0.6))
        small = plan.apply(model, progress=False)
        repaired = zp.repair(model, small, plan, images, progress=False)
        again = zp.Plan(zp.trace(model, x[:1], progress=False), plan.removed)
        assert zp.agreement(model, repaired, None, x[:2]).cosine.device.type == 'cpu'
    assert again.removed == plan.removed == wanted['removed']
    assert torch.allclose(repaired(x[:3]), wanted['outputs']['repaired'], 1e-3, 1e-4)


class Remembers(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.__dict__['made'] = torch.empty(1)
        return x.relu()


def test_a_run_in_a_thread_has_the_default_device_of_the_thread_that_made_it() -> None:
    network = Remembers()
    torch.set_default_device('meta')
    try:
        run = Lockstep(network, torch.ones(2, 3, device='cpu'), ())
    finally:
        torch.set_default_device(None)
    assert run.next() is None
    assert network.made.device.type == 'meta'


@pytest.mark.parametrize('set_to', ['highest', 'high', 'medium'])
@pytest.mark.parametrize('rounds', [False, True])
def test_a_proof_rounds_nothing_and_leaves_the_flags(set_to: str, rounds: bool) -> None:
    flags = torch.backends.cudnn
    before = flags.allow_tf32, torch.get_float32_matmul_precision()
    try:
        flags.allow_tf32 = rounds
        torch.set_float32_matmul_precision(set_to)
        with unrounded(torch.device('cuda')):
            assert not flags.allow_tf32 and torch.get_float32_matmul_precision() == 'highest'
        assert flags.allow_tf32 == rounds and torch.get_float32_matmul_precision() == set_to
        with unrounded(torch.device('cpu')):
            assert torch.get_float32_matmul_precision() == set_to
    finally:
        flags.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, 'conv'), reason='an older torch')
def test_a_proof_leaves_flags_that_were_set_by_layer() -> None:
    backends: Any = torch.backends
    layers = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
    before = [layer.fp32_precision for layer in layers]
    try:
        backends.cudnn.conv.fp32_precision, backends.cudnn.rnn.fp32_precision = 'tf32', 'ieee'
        with unrounded(torch.device('cuda')):
            assert [layer.fp32_precision for layer in layers] == ['ieee'] * 3
        assert [layer.fp32_precision for layer in layers] == ['tf32', 'ieee', before[2]]
    finally:
        for layer, precision in zip(layers, before):
            layer.fp32_precision = precision


@pytest.mark.parametrize('dtype, value', [(torch.float32, 1), (torch.complex64, 1), (torch.bool, 1), (torch.int64, 0),
                                          (torch.uint8, 0)])
def test_whole_numbers_that_are_timed_are_indices_of_anything(dtype: torch.dtype, value: int) -> None:
    made = Like((2, 3), dtype, (1, 0)).made(torch.device('cpu'))
    assert made.shape == (2, 3) and made.dtype == dtype and (made == value).all()
