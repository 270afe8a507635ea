'''What stands in, while a network is traced, for functions of torch that cannot be followed as they are.'''
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import nn


def padded(input: torch.Tensor, pad: Sequence[int], mode: str = 'constant', value: float | None = None) -> torch.Tensor:
    '''``F.pad``, which in its circular mode writes into views of an empty tensor: here that is a concatenation.'''
    if mode != 'circular' or min(pad) < 0:
        return nn.functional.pad(input, pad, mode, value)
    for position, (before, after) in enumerate(zip(pad[::2], pad[1::2])):
        dim = input.dim() - 1 - position
        ends = input.narrow(dim, input.shape[dim] - before, before), input.narrow(dim, 0, after)
        input = torch.cat([ends[0], input, ends[1]], dim)
    return input


def einsum(equation: Any, *operands: Any) -> torch.Tensor:
    '''``torch.einsum``, which multiplies elements where all dimensions that are summed over have size 1.

    Here it multiplies matrices then, too, so that a network narrowed so far runs what the original runs. Equations with
    dots, with a letter twice in one term or of sizes that broadcast are torch's.
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
    '''The letters of each operand and of the result.'''
    left, arrow, output = equation.replace(' ', '').partition('->')
    return left.split(','), output if arrow else ''.join(sorted(letter for letter in set(left) - {','}
                                                                if left.count(letter) == 1))


def _is_plain(terms: Sequence[str], output: str, tensors: Sequence[torch.Tensor]) -> bool:
    '''Whether there are several operands, and each letter stands for one size and once in a term.'''
    letters = ''.join(terms)
    if (len(terms) < 2 or not letters.isalpha() or not set(output) <= set(letters)
            or any(len(set(term)) != len(term) for term in (*terms, output))
            or [len(term) for term in terms] != [tensor.dim() for tensor in tensors]):
        return False
    sizes = {(letter, size) for term, tensor in zip(terms, tensors) for letter, size in zip(term, tensor.shape)}
    return len(dict(sizes)) == len(sizes)


def _product(term: str, tensor: torch.Tensor, other: str, right: torch.Tensor,
             kept: set[str]) -> tuple[str, torch.Tensor]:
    '''Sum over what two tensors share and nobody needs any more; and before that, over what one of them has alone.'''
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
    '''A tensor with one dimension for each part of its letters.'''
    tensor = tensor.permute([term.index(letter) for part in parts for letter in part])
    sizes = iter(tensor.shape)
    return tensor.reshape([prod(next(sizes) for _ in part) for part in parts])


SUBSTITUTES: dict[Callable[..., Any], Callable[..., Any]] = {nn.functional.pad: padded, torch.einsum: einsum}
