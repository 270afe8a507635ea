'''Nothing forgets the device: what makes tensors names one, and the main job runs where nothing may be mixed.'''
from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import zennit_prune

PACKAGE = Path(zennit_prune.__file__).parent
FACTORIES = {'arange', 'as_tensor', 'asarray', 'empty', 'empty_permuted', 'empty_strided', 'eye', 'full', 'linspace',
             'logspace', 'normal', 'ones', 'rand', 'randint', 'randn', 'randperm', 'range', 'scalar_tensor', 'tensor',
             'tril_indices', 'triu_indices', 'zeros'}

# by file and function: why what is made of an array of NumPy's stays on the CPU
FROM_NUMPY = {
    'cli/_demo.py load_digits': 'the data of the demo, which runs on the CPU',
    'planning/_carry.py carried_back': 'scores, which are on the CPU',
    'relevance/_criteria.py _averaged': 'indexes weights that were moved to the CPU',
    'relevance/_criteria.py _reading': 'indexes weights that were moved to the CPU',
    'relevance/_exemplars.py _places': 'moved where it is used',
    'relevance/_exemplars.py _unravelled': 'exemplars, which are on the CPU',
    'relevance/_states.py _state': 'positions, moved where they are used',
    'tracing/_operations.py _run_on': 'labels, on which the operation itself is run',
    'tracing/_operations.py index': 'labels, on which the operation itself is run',
}
# and why a tensor that becomes an array is on the CPU
TO_NUMPY = {
    'looking/_charts.py picture': 'moved at the start',
    'looking/_charts.py heat': 'moved at the start',
    'looking/_heatmap.py _picture': 'moved at the start',
    'looking/_heatmap.py heatmap_image': 'moved before they are scaled',
    'pipeline/_pruner.py plan': 'scores, which are on the CPU',
    'planning/_carry.py carried_back': 'scores, which are on the CPU',
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
