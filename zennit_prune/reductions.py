'''The rules of reductions: whatever runs over labelled dimensions would change when channels go.'''
from __future__ import annotations

import numpy as np

from .labels import Field, Labels
from .rules import Call, Candidates, NoRule, operation_rule


@operation_rule('logsumexp', zero='never')
@operation_rule('mean', 'sum', 'amax', 'amin', 'var', 'std', 'var_mean', 'max', 'min',
                'linalg_vector_norm', 'prod', 'any', 'all')
def reduction(call: Call) -> Candidates:
    '''A reduction over a labelled dimension would change when channels go.'''
    x, shift = call.args[0], call.name == 'linalg_vector_norm'
    dims = call.argument(1 + shift, 'dim')
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        raise NoRule
    dims = sorted(dim % x.dim() for dim in dims)
    keepdim = call.outputs[0].dim() == x.dim()
    result: list[Field | Labels] = []
    for field in call.fields(x):
        if set(field.dims) <= set(dims):
            call.lock(f'{call.name} runs over it', field)
            continue
        kept = call.tie_along(field, dims)
        if not keepdim:
            position = {d: k for k, d in enumerate(d for d in range(x.dim()) if d not in dims)}
            kept = Field(np.squeeze(kept.labels, tuple(dims)), tuple(position[d] for d in kept.dims))
        result.append(kept)
    return [list(result) for _ in call.outputs]


@operation_rule('_softmax', '_safe_softmax', '_log_softmax', 'logcumsumexp', zero='never')
@operation_rule('cumsum')
def softmax(call: Call) -> Candidates:
    '''What is normalised over a labelled dimension changes when channels go.'''
    dim = call.dim(1)
    result: list[Field | Labels] = []
    for field in call.fields(call.args[0]):
        if field.dims == (dim,):
            call.lock(f'{call.name.strip("_")} runs over it', field)
        else:
            result.append(call.tie_along(field, [dim]))
    return [result]
