'''Watch the calls of modules and torch functions while a network is traced.

Three classes note more and more: :class:`Guard` sees to it that the tracer misses nothing, :class:`Outputs` notes the
labels that modules return, :class:`Boundaries` all values that enter and leave. Functions of torch that cannot be
followed as they are, circular padding and ``einsum``, are replaced by equivalents during the run.
'''
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from ..util._display import advance
from ..util._networks import computed_name, output_tensors, tensors_by_module, tensors_in
from ._attributes import SHAPED, Claim, stated_sizes
from ._calls import CallCounter, Frame, Site
from ._labels import Field
from ._parametrized import parametrizations, record_computed
from ._recorded import Argument, FunctionCall, numbers_in
from ._tracer import Tracer, refuse_values


def padded(input: torch.Tensor, pad: Sequence[int], mode: str = 'constant', value: float | None = None) -> torch.Tensor:
    '''Replace ``F.pad``, whose circular mode writes into views of an empty tensor, by a concatenation.'''
    if mode != 'circular' or min(pad) < 0:
        return nn.functional.pad(input, pad, mode, value)
    for position, (before, after) in enumerate(zip(pad[::2], pad[1::2])):
        dim = input.dim() - 1 - position
        ends = input.narrow(dim, input.shape[dim] - before, before), input.narrow(dim, 0, after)
        input = torch.cat([ends[0], input, ends[1]], dim)
    return input


def einsum(equation: Any, *operands: Any) -> torch.Tensor:
    '''Replace ``torch.einsum`` by products of matrices.

    Torch multiplies elements instead where all dimensions that are summed over have size 1, so that a network narrowed
    to one channel would run other operations than the original. Equations with dots, with a letter twice in one term or
    of sizes that broadcast are left to torch.
    '''
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    terms, output = _terms(equation) if isinstance(equation, str) else ([], '')
    if not _is_plain(terms, output, tensors):
        return torch.einsum(equation, *operands)
    term, result = terms[0], tensors[0]
    for position, (other, tensor) in enumerate(zip(terms[1:], tensors[1:]), 2):
        term, result = _product(term, result, other, tensor, set(output).union(*terms[position:]))
    return result.permute([term.index(letter) for letter in output])


def _terms(equation: str) -> tuple[list[str], str]:
    '''Return the letters of each operand and of the result of an equation.'''
    left, arrow, output = equation.replace(' ', '').partition('->')
    return left.split(','), output if arrow else ''.join(sorted(letter for letter in set(left) - {','}
                                                                if left.count(letter) == 1))


def _is_plain(terms: Sequence[str], output: str, tensors: Sequence[torch.Tensor]) -> bool:
    '''Return whether there are several operands, and each letter stands for one size and once in a term.'''
    letters = ''.join(terms)
    if (len(terms) < 2 or not letters.isalpha() or not set(output) <= set(letters)
            or any(len(set(term)) != len(term) for term in (*terms, output))
            or [len(term) for term in terms] != [tensor.dim() for tensor in tensors]):
        return False
    sizes = {(letter, size) for term, tensor in zip(terms, tensors) for letter, size in zip(term, tensor.shape)}
    return len(dict(sizes)) == len(sizes)


def _product(term: str, tensor: torch.Tensor, other: str, right: torch.Tensor,
             kept: set[str]) -> tuple[str, torch.Tensor]:
    '''Multiply two tensors, and sum over the letters that are not kept.'''
    term, tensor = _summed(term, tensor, kept.union(other))
    other, right = _summed(other, right, kept.union(term))
    inner = [letter for letter in term if letter in other and letter not in kept]
    batch = [letter for letter in term if letter in other and letter in kept]
    rows = [letter for letter in term if letter not in other]
    columns = [letter for letter in other if letter not in term]
    found = ''.join([*batch, *rows, *columns])
    if not inner:
        return found, torch.einsum(f'{term},{other}->{found}', tensor, right)
    sizes = {**dict(zip(term, tensor.shape)), **dict(zip(other, right.shape))}
    product = torch.bmm(_matrices(term, tensor, batch, rows, inner), _matrices(other, right, batch, inner, columns))
    return found, product.reshape([sizes[letter] for letter in found])


def _summed(term: str, tensor: torch.Tensor, kept: Iterable[str]) -> tuple[str, torch.Tensor]:
    dims = [dim for dim, letter in enumerate(term) if letter not in kept]
    return (''.join(letter for letter in term if letter in kept), tensor.sum(dims)) if dims else (term, tensor)


def _matrices(term: str, tensor: torch.Tensor, *parts: list[str]) -> torch.Tensor:
    '''Permute and reshape a tensor so that it has one dimension for each part of its letters.'''
    tensor = tensor.permute([term.index(letter) for part in parts for letter in part])
    sizes = iter(tensor.shape)
    return tensor.reshape([prod(next(sizes) for _ in part) for part in parts])


SUBSTITUTES: dict[Callable[..., Any], Callable[..., Any]] = {nn.functional.pad: padded, torch.einsum: einsum}


MATRIX_PRODUCTS = {nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
                   torch.Tensor.__rmatmul__}
FROM_NUMBERS = {'tensor', 'as_tensor', 'asarray', 'new_tensor', 'new'}
TO_PYTHON = {'tolist', 'numpy', '__array__', 'allclose', 'equal', '__dlpack__'}


class Place(NamedTuple):
    '''A place where a value can be read in another run.

    Attributes
    ----------
    side: str
        ``'input'`` where the value enters a call of a module, ``'output'`` where it leaves one, ``'function'`` where a
        torch function returns it.
    module: str
        The name of the module.
    call: int
        The number of calls of the module before this one.
    position: int
        The position among the tensors that enter or leave.
    site: Site or None
        The call of the torch function.
    '''

    side: str
    module: str
    call: int
    position: int
    site: Site | None = None


class Guard(CallCounter):
    '''A counter of calls that makes the tracer see everything that depends on sizes or values.'''

    tracer: Tracer

    def __init__(self, root: nn.Module):
        super().__init__(root)
        self.places: dict[int, list[Place]] = {}
        self.outputs: dict[tuple[str, int], list[list[Field]]] = {}
        self.functions: list[FunctionCall] = []
        self.claims: list[Claim] = []
        self._parametrizations = parametrizations(root)

    def entered(self, frame: Frame, inputs: Any) -> None:
        if frame.module in self._parametrizations:
            self.tracer.silent += 1

    def left(self, frame: Frame, output: Any) -> None:
        if frame.module in self._parametrizations:
            self.tracer.silent -= 1
            tensors = [tensor for _, tensor in tensors_by_module(self._parametrizations[frame.module])]
            record_computed(self.tracer, computed_name(f'{frame.module}.'), tensors, output)

    def _enter(self, module: nn.Module, inputs: Any) -> Any:
        advance()
        return super()._enter(module, inputs)

    def intercept(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        if func in MATRIX_PRODUCTS:  # which operations these become depends on strides, and strides on sizes
            args = tuple(value.contiguous() if isinstance(value, torch.Tensor) and value.dim() > 2 else value
                         for value in args)
        elif func in SUBSTITUTES:
            func = SUBSTITUTES[func]
        elif self.function in FROM_NUMBERS:
            self.tracer.constant(numbers_in(args))
        elif self.function in TO_PYTHON:
            refuse_values(self.tracer, self.function, tensors_in((args, kwargs)))
        return self.run(func, args, kwargs)

    def run(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        '''Run a torch function; subclasses note its arguments and its result.'''
        return func(*args, **kwargs)


class Outputs(Guard):
    '''A guard that notes the labels of module outputs, and which attributes of modules are sizes.'''

    def run(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        result = super().run(func, args, kwargs)
        if self.function in SHAPED:
            for attribute, dim in stated_sizes(self.function, args, kwargs, result):
                self.claims.append(Claim(attribute, self.tracer.fields_of(result), dim, result.shape[dim]))
        return result

    def left(self, frame: Frame, output: Any) -> None:
        super().left(frame, output)
        self.outputs[frame.module, frame.call] = list(map(self.tracer.fields_of, output_tensors(output)))


class Boundaries(Outputs):
    '''A guard that also notes which values enter and leave modules and torch functions.'''

    def entered(self, frame: Frame, inputs: Any) -> None:
        super().entered(frame, inputs)
        self._note('input', frame.module, frame.call, inputs)

    def left(self, frame: Frame, output: Any) -> None:
        super().left(frame, output)
        self._note('output', frame.module, frame.call, output)

    def run(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        site, tracer = self.site, self.tracer
        tensors = tensors_in(args) + tensors_in(kwargs) if kwargs else tensors_in(args)
        arguments = [Argument(tracer.value_of(tensor), tracer.is_active(tensor), tuple(tensor.shape))
                     for tensor in tensors]
        before = len(tracer.operations)
        result = super().run(func, args, kwargs)
        self._note('function', site.module, site.call, result, site)
        if any(argument.active for argument in arguments):
            in_place = next((position for position, tensor in enumerate(tensors) if tensor is result), None)
            self.functions.append(FunctionCall(site, arguments, list(map(tracer.value_of, tensors_in(result))),
                                               tracer.operations[before:], in_place))
        return result

    def _note(self, side: str, module: str, call: int, tensors: Any, site: Site | None = None) -> None:
        for position, tensor in enumerate(tensors_in(tensors)):
            if self.tracer.fields_of(tensor):
                place = Place(side, module, call, position, site)
                self.places.setdefault(self.tracer.value_of(tensor), []).append(place)
