'''Compare the outputs of a pruned network with those of the masked original.'''
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import PruneError, VerificationError
from ..tracing._trace import Example, prepare_example
from ..util._display import advance
from ..util._isolation import exact_pass, isolated, unrounded
from ..util._networks import device_of, map_tensors, output_tensors
from ._masking import masked_copy
from ._replay import Deletion
from ._surgery import RemovableChannels

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    '''Put a network into evaluation mode inside the context; every module's own training flag is restored after.'''
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, flag in flags.items():
            module.training = flag


def compare(graph: RemovableChannels, model: nn.Module, small: nn.Module, removed: Mapping[str, Sequence[int]],
            example: Any, seed: int = 0) -> float:
    '''Run the masked original and the pruned network on the same noise.

    Parameters
    ----------
    graph: Channels
        The removable channels of the original.
    removed: mapping of str to sequence of int
        The removed positions by the name of the group.
    model, small: torch.nn.Module
        The original and the pruned network; both are left as they are.
    example: torch.Tensor, tuple, dict or Example
        Floating-point tensors in it are replaced by seeded Gaussian noise of their shape; others are used as they are.
        The global random state is not touched.
    seed: int
        The seed of the noise.

    Returns
    -------
    float
        The largest absolute difference of any output over the largest absolute output.

    Raises
    ------
    VerificationError
        If that exceeds 1e-10 (float64), 1e-4 (float32), 2e-2 (float16) or 1e-1 (bfloat16), or is not finite.
    '''
    if any(tensor.is_meta for tensor in small.parameters()):
        raise PruneError("the network is on 'meta', where it has no numbers to compare: pass verify=False, the "
                         'structural proof is made all the same.')
    given = prepare_example(model, example)
    args, kwargs = noise(given, seed)
    masked = masked_copy(graph, model, removed)
    with (torch.no_grad(), exact_pass(), unrounded(device_of(small)), isolated(small), evaluating(masked),
          evaluating(small)):
        expected, outputs = _values(masked, args, kwargs), _values(small, args, kwargs)
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in outputs]:
        raise VerificationError(f'the pruned network returns tensors of shape {[tuple(t.shape) for t in outputs]} '
                                f'instead of {[tuple(t.shape) for t in expected]}.')
    if not expected:
        raise VerificationError('the network returns no floating-point numbers that could be compared, on Gaussian '
                                'noise at least (a detector finds nothing there): pass verify=False, the structural '
                                'proof is made all the same.')
    if not all(torch.isfinite(tensor).all() for tensor in expected):
        raise VerificationError('the masked original returns values that are not finite on Gaussian noise, so nothing '
                                'can be compared. Check the weights, or pass verify=False: the structural proof is '
                                'made all the same.')
    error = _difference(expected, outputs) / (max(float(tensor.abs().max()) for tensor in expected) or 1.0)
    dtype = expected[0].dtype
    allowed = TOLERANCE.get(dtype, 1e-4)
    if not error <= allowed:
        with torch.no_grad(), exact_pass(), unrounded(device_of(small)), evaluating(masked):
            again = _values(masked, args, kwargs)
        if _difference(expected, again) > 0:
            raise VerificationError('the network returns other values at each call (it draws random numbers in '
                                    'evaluation mode), so numbers cannot be compared: pass verify=False, the '
                                    'structural proof is made all the same.')
        where = _first_wrong(graph, masked, small, removed, args, kwargs, allowed)
        how = f'differs from the masked original by {error:.3g} of the largest output ({dtype}, allowed {allowed:g})'
        if not math.isfinite(error):
            how = 'returns values that are not finite, which the masked original does not'
        raise VerificationError(f'the pruned network {how}; the first layer that differs is {where}.')
    return error


def _difference(expected: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> float:
    '''Return the largest absolute difference of any tensors, NaN where any value is NaN.'''
    return float(np.max([float((a - b).abs().max()) for a, b in zip(expected, outputs)]))


def _values(network: nn.Module, args: Any, kwargs: Any) -> list[torch.Tensor]:
    '''Return the floating-point tensors that a network returns, without empty ones.'''
    advance()
    tensors = output_tensors(network(*args, **kwargs))
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]


def noise(example: Example, seed: int) -> tuple[Any, Any]:
    '''Return the example's arguments with Gaussian noise in place of every floating-point tensor.'''
    generator = torch.Generator().manual_seed(seed)

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, device='cpu').to(tensor.device, tensor.dtype)

    return map_tensors(drawn, example.args), map_tensors(drawn, example.kwargs)


def _first_wrong(graph: RemovableChannels, masked: nn.Module, small: nn.Module, removed: Mapping[str, Sequence[int]],
                 args: Any, kwargs: Any, allowed: float) -> str:
    '''Name the first module, in execution order, whose remaining output channels differ.'''
    deletion = Deletion(graph._removed_labels(removed))
    seen = [_module_outputs(network, args, kwargs) for network in (masked, small)]
    traced = [run.outputs for run in graph._recording.runs.values() if not run.training]
    for key, tensors in min(traced, key=lambda found: len(found.keys() ^ seen[0].keys())).items():
        for fields, before, after in zip(tensors, *(outputs.get(key, []) for outputs in seen)):
            for dim, mask in deletion(fields)[1].items():
                if before.shape[dim] == len(mask):
                    before = before.index_select(dim, torch.from_numpy(mask.nonzero()[0]).to(before.device))
            scale = float(before.abs().max()) if before.numel() else 0.0
            if before.shape != after.shape or (
                    before.numel() and not float((before - after).abs().max()) <= allowed * (scale or 1.0)):
                return repr(key[0] or 'the network itself')
    return 'not one of its modules'


def _module_outputs(network: nn.Module, args: Any, kwargs: Any) -> dict[tuple[str, int], list[torch.Tensor]]:
    '''Return the output tensors of every call of every module, by the module's name and the number of the call.'''
    outputs: dict[tuple[str, int], list[torch.Tensor]] = {}
    names = {module: name for name, module in network.named_modules()}
    calls = dict.fromkeys(names.values(), 0)

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        name = names[module]
        outputs[name, calls[name]] = [tensor.detach().clone() for tensor in output_tensors(output)]
        calls[name] += 1

    handles = [module.register_forward_hook(keep) for module in names]
    try:
        with torch.no_grad(), exact_pass(), unrounded(device_of(network)), evaluating(network):
            network(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
