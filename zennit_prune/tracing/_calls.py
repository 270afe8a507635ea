'''Name every Python-level call of a running network, so that an operation seen in one run is found again in another.

A call is named by its :class:`Site`: the module that runs, how often that was called before, and the torch function.
'''
from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn
from torch.overrides import TorchFunctionMode

from ..util._networks import modules_by_name


def _seen_through(function: Any) -> Any:
    '''Copy a torch function so that a mode sees the functions that it calls instead of one call as a whole.'''
    seen = FunctionType(function.__code__, {**function.__globals__, 'has_torch_function': lambda *_: False},
                        function.__name__, function.__defaults__, function.__closure__)
    seen.__kwdefaults__ = function.__kwdefaults__
    return seen


TENSORS = {'input': 0, 'weight': 1, 'bias': 2}  # keywords in the order of positions, however they were given
MULTI_HEAD_ATTENTION = nn.functional.multi_head_attention_forward
SEEN_THROUGH = {MULTI_HEAD_ATTENTION: _seen_through(MULTI_HEAD_ATTENTION)}


class Site(NamedTuple):
    '''The place in a run where a torch function was called.

    Attributes
    ----------
    module: str
        The name of the module that was running; empty for the network itself.
    call: int
        The number of calls of the module before this one.
    function: str
        The name of the torch function.
    ordinal: int
        The number of calls of the function that this call of the module made before.

    Examples
    --------
    >>> from zennit_prune.tracing import Site
    >>> Site('layer1.0', 0, 'relu', 1)  # the second F.relu in the first call of a block
    Site(module='layer1.0', call=0, function='relu', ordinal=1)
    '''

    module: str
    call: int
    function: str
    ordinal: int


class Frame:
    '''One call of a module that is running now, with the number of calls of each torch function in it.'''

    __slots__ = ('call', 'counts', 'kind', 'module')

    def __init__(self, module: str, kind: str, call: int):
        self.module, self.kind, self.call = module, kind, call
        self.counts: dict[str, int] = {}


class CallCounter(TorchFunctionMode):
    '''A mode that, while active, counts the calls of modules and torch functions of a network.

    ``site`` says where the run is, and ``failed`` names the module in which it raised an error, if it did.

    Subclasses override :meth:`intercept` to see or change what a function returns, and :meth:`entered` and :meth:`left`
    to see what goes into and comes out of modules.

    Parameters
    ----------
    root: torch.nn.Module
        The network whose modules are named.
    '''

    def __init__(self, root: nn.Module):
        super().__init__()
        self._names = {id(module): name for name, module in reversed(modules_by_name(root))}
        self._restart()

    def _restart(self) -> None:
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._stack = [Frame('', '', 0)]
        self.function, self.ordinal = '', 0
        self.failed = ''
        self._outer_error = sys.exc_info()[1]
        self._thread = get_ident()

    @property
    def site(self) -> Site:
        '''The site of the call that is running now.'''
        frame = self._stack[-1]
        return Site(frame.module, frame.call, self.function, self.ordinal)

    @property
    def kind(self) -> str:
        '''The class name of the module that is running now.'''
        return self._stack[-1].kind

    def __enter__(self) -> CallCounter:
        self._restart()
        self._handles = [
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> Any:
        if get_ident() != self._thread:  # another network runs there
            return None
        name = self._names.get(id(module), f'{self._stack[-1].module}/?')  # a module made while the network runs
        frame = Frame(name, type(module).__name__, self._calls[name])
        self._calls[name] += 1
        self._stack.append(frame)
        return self.entered(frame, inputs)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if get_ident() != self._thread:
            return
        frame = self._stack.pop()
        if sys.exc_info()[1] is self._outer_error:
            self.left(frame, output)
        else:
            self.failed = self.failed or frame.module

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SEEN_THROUGH:
            with self._again():
                return SEEN_THROUGH[func](*args, **kwargs)
        name = getattr(func, '__name__', '')
        if name == '__get__' or name == '__set__':
            return func(*args, **kwargs)
        if len(kwargs) > 1:
            kwargs = dict(sorted(kwargs.items(), key=lambda item: TENSORS.get(item[0], len(TENSORS))))
        frame, outer = self._stack[-1], (self.function, self.ordinal)
        self.function, self.ordinal = name, frame.counts.get(name, 0)
        frame.counts[name] = self.ordinal + 1
        try:
            return self.intercept(func, args, kwargs)
        finally:
            self.function, self.ordinal = outer

    def accompany(self, network: nn.Module) -> None:
        '''Activate the counter whenever ``network`` runs from now on.'''
        forward = network.forward

        def accompanied_forward(*args: Any, **kwargs: Any) -> Any:
            with self:
                return forward(*args, **kwargs)

        network.forward = accompanied_forward

    @contextmanager
    def _again(self) -> Iterator[None]:
        '''Activate the counter inside a function that was counted already.'''
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def intercept(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        '''Run a torch function; subclasses may see or change its arguments and its result.'''
        return func(*args, **kwargs)

    def entered(self, frame: Frame, inputs: Any) -> Any:
        '''Handle a call of a module; a returned value other than None replaces its inputs.'''

    def left(self, frame: Frame, output: Any) -> None:
        '''Handle the return of ``output`` from a module.'''
