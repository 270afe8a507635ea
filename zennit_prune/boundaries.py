'''Watch the calls of modules and torch functions while a network is traced.'''
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .attributes import SHAPED, Claim, stated_sizes
from .calls import CallCounter, Frame, Site
from .labels import Field
from .networks import computed_name, output_tensors, tensors_by_module, tensors_in
from .parametrized import parametrizations, record_computed
from .progress import advance
from .recorded import Argument, FunctionCall, numbers_in
from .refusals import refuse_values
from .substitutes import SUBSTITUTES
from .tracer import Tracer

MATRIX_PRODUCTS = {nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
                   torch.Tensor.__rmatmul__}
FROM_NUMBERS = {'tensor', 'as_tensor', 'asarray', 'new_tensor', 'new'}
TO_PYTHON = {'tolist', 'numpy', '__array__', 'allclose', 'equal', '__dlpack__'}


class Place(NamedTuple):
    '''Where a value can be read in another run.

    The n-th tensor that enters (``'input'``) or leaves (``'output'``) a call of a module, or that a torch function
    returns (``'function'``, called at ``site``).
    '''

    side: str
    module: str
    call: int
    position: int
    site: Site | None = None


class Guard(CallCounter):
    '''Count calls, and see to it that the tracer misses nothing that depends on sizes or values.'''

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
        '''Run a torch function.'''
        return func(*args, **kwargs)


class Outputs(Guard):
    '''Note, besides, the labels of what modules return, and which attributes of modules are sizes.'''

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
    '''Note, besides, which values enter and leave modules and torch functions.'''

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
