'''The rules of operations that move, combine or reduce data, named as in PyTorch's ATen library.

``cat``, ``split`` and ``glu`` show the idea: labels are moved like data, tied where channels must be removed together,
and locked where they must stay. The rules of operations with weights are in ``_contractions.py``; ``_rules.py`` says
what a rule is.
'''
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..util._networks import tensors_in
from ._labels import Field, Labels, first, flat, in_rows, reshaped
from ._rules import Call, Candidates, NoRule, declare, operation_rule

# pointwise operations are found by their tag; older releases lack it on some
declare('clamp', 'clamp_min', 'pow', 'rsqrt', 'exp', 'masked_fill', 'where', 'copy', 'sigmoid', 'softplus', 'elu',
        'hardsigmoid', pointwise=True)
declare('relu', 'gelu', 'silu', 'tanh', 'leaky_relu', 'elu', 'mish', 'hardswish', 'hardtanh', 'prelu', '_prelu_kernel',
        'neg', 'sqrt', 'abs', pointwise=True, zero='all')
declare('add', 'sub', pointwise=True, zero='terms')
declare('mul', pointwise=True, zero='any')
declare('div', pointwise=True, zero='first')
declare('empty', 'zeros', 'ones', 'full', 'rand', 'randn', 'empty_permuted', constant=True, sized=True, size_free=True)
declare('bernoulli', 'uniform', 'normal', 'fill', 'zero', 'exponential', refills=True, size_free=True)
declare('_local_scalar_dense', 'is_nonzero', 'equal', needs_value=True)
declare('nonzero', 'masked_select', '_unique2', 'unique_dim', 'torchvision::nms', counts=True)



def combine(call: Call, operands: Sequence[tuple[Sequence[int], Sequence[Field]]], ndim: int) -> list[Field]:
    '''Tie the labels that meet where ``operands`` (shape, fields) broadcast, and return the fields of the result.'''
    shapes = [(1,) * (ndim - len(shape)) + tuple(shape) for shape, _ in operands]
    items = [(position, field.aligned(ndim)) for position, (_, fields) in enumerate(operands) for field in fields]
    for position, field in items:
        for other, shape in enumerate(shapes):
            if other == position or all(shape[dim] == 1 for dim in field.dims):
                continue
            partners = [partner for where, partner in items if where == other and set(partner.dims) & set(field.dims)]
            if not partners:
                call.lock('it meets a tensor of fixed size', field)
            elif other > position:
                for partner in partners:
                    call.tie(field.labels, partner.labels)
    result: list[Field] = []
    for _, field in sorted(items, key=lambda item: -len(item[1].dims)):
        if not any(set(field.dims) <= set(other.dims) for other in result):
            result.append(field)
    return result


def pointwise(call: Call) -> Candidates:
    '''Tie the labels that meet in an element-wise operation.'''
    operands = tensors_in((call.args, call.kwargs))
    if len(operands) == 1:
        result = call.fields(operands[0])
    else:
        written = call.outputs[0] if call.in_place else None
        shapes = [(1,) * tensor.dim() if call.is_uniform(tensor) and tensor is not written else tuple(tensor.shape)
                  for tensor in operands]
        result = combine(call, list(zip(shapes, map(call.fields, operands))), call.outputs[0].dim())
    return [list(result) for _ in call.outputs]


@operation_rule('clone', '_to_copy', 'contiguous', 'lift_fresh', 'native_dropout', 'detach', 'alias', transparent=True,
                size_free=True)
@operation_rule('zeros_like', constant=True, sized=True, size_free=True)
@operation_rule('ones_like', 'empty_like', 'full_like', 'rand_like', 'randn_like', constant=True, sized=True,
                size_free=True, zero='never')
@operation_rule('bernoulli', 'fill', 'uniform', 'normal', zero='never')
@operation_rule('zero')
def same_shape(call: Call) -> Candidates:
    '''Give the result, which has the shape of the first argument, its fields.'''
    return [list(call.fields(call.args[0])) for _ in call.outputs]


@operation_rule('new_zeros', 'new_empty', 'new_ones', 'new_full', 'new_empty_strided', constant=True, sized=True,
                size_free=True)
def unlabelled(call: Call) -> Candidates:
    '''Give the result, whose size is stated by numbers, no field.'''
    return [[] for _ in call.outputs]


def _run_on(array: Labels, call: Call) -> list[Labels]:
    '''Execute the operation itself on a label array.'''
    result = call.func(torch.from_numpy(array), *call.args[1:], **call.kwargs)
    return [Labels(tensor.numpy()) for tensor in tensors_in(result)]


@operation_rule('permute', 'transpose', 't', 'unsqueeze', size_free=True)
@operation_rule('numpy_T', 'moveaxis', 'flip', 'roll')
def movement(call: Call) -> Candidates:
    '''Move dimensions, or data within one, by executing the operation on the labels as they are.'''
    if call.name == 'roll' and not call.argument(2, 'dims'):
        raise NoRule  # it runs over the flattened tensor
    ndim = call.args[0].dim()
    if call.name in ('permute', 'transpose', 't'):
        order = list(call.argument(1, 'dims') if call.name == 'permute' else range(ndim))
        if call.name != 'permute' and ndim > 1:
            one, other = (call.argument(1, 'dim0'), call.argument(2, 'dim1')) if call.name == 'transpose' else (0, 1)
            order[one], order[other] = order[other], order[one]
        return [[field.labels.transpose(order) for field in call.fields(call.args[0])]]
    moved = [_run_on(field.labels, call) for field in call.fields(call.args[0])]
    return [[arrays[k] for arrays in moved] for k in range(len(call.outputs))]


@operation_rule('expand', sized=True, size_free=True)
@operation_rule('squeeze', size_free=True)
@operation_rule('unbind', 'repeat', 'pixel_shuffle', 'pixel_unshuffle', 'channel_shuffle',
                'unfold', 'diagonal')
def movement_at_size(call: Call) -> Candidates:
    '''Move data, where the effect depends on all sizes, by executing the operation on labels at full size.'''
    shape = call.args[0].shape
    moved = [_run_on(Labels(np.broadcast_to(field.labels, shape)), call) for field in call.fields(call.args[0])]
    return [[arrays[k] for arrays in moved] for k in range(len(call.outputs))]


@operation_rule('view', sized=True, size_free=True)
def view(call: Call) -> Candidates:
    '''Reshape the labels with the tensor.'''
    old, new = tuple(call.args[0].shape), tuple(call.outputs[0].shape)
    return [[reshaped(field, old, new) for field in call.fields(call.args[0])]]


@operation_rule('as_strided', transparent=True, sized=True, size_free=True)
def as_strided(call: Call) -> Candidates:
    '''Accept a call that changes neither shape, nor strides of dimensions above size 1, nor the start.'''
    x, out = call.args[0], call.outputs[0]
    moved = any(size > 1 and old != new for size, old, new in zip(x.shape, x.stride(), out.stride()))
    if x.shape != out.shape or moved or x.storage_offset() != out.storage_offset():
        raise NoRule
    return same_shape(call)


@operation_rule('constant_pad_nd')
def constant_pad(call: Call) -> Candidates:
    '''Fix new positions along a labelled dimension; the border of a channel belongs to the channel.'''
    ndim, amounts = call.args[0].dim(), list(call.args[1])
    result: list[Field | Labels] = []
    for field in call.fields(call.args[0]):
        labels = field.labels
        for dim in field.dims:
            before, after = amounts[2 * (ndim - 1 - dim):2 * (ndim - dim)] or (0, 0)
            if before < 0 or after < 0:
                call.lock('it is cropped by a fixed amount', labels)
            widths = [(max(before, 0), max(after, 0)) if d == dim else (0, 0) for d in range(ndim)]
            padded = np.pad(labels, widths)
            inside = slice(max(-before, 0), padded.shape[dim] - max(-after, 0))
            labels = Labels(padded[(slice(None),) * dim + (inside,)])
        result.append(Field(labels, field.dims))
    return [result]


@operation_rule('im2col')
def im2col(call: Call) -> Candidates:
    '''Turn the channels of (N, C, H, W) into rows of (N, C * kernel size, positions).'''
    kernel = int(np.prod(call.args[1]))
    result: list[Field | Labels] = []
    for field in call.fields(call.args[0]):
        if field.dims != (1,):
            call.lock('patches are cut across it', field)
            continue
        result.append(Field.along(Labels(np.repeat(flat(field.labels), kernel)), 1, call.outputs[0].dim()))
    return [result]


@operation_rule('split', 'split_with_sizes', 'unsafe_split', 'unsafe_split_with_sizes', sized=True)
def split(call: Call) -> Candidates:
    '''Let equal blocks of a labelled dimension lose equally many positions, so that they stay equal.'''
    dim = call.dim(2)
    sizes = [tensor.shape[dim] for tensor in call.outputs]
    stops = np.cumsum(sizes)
    results: list[list[Field | Labels]] = [[] for _ in call.outputs]
    for field in call.fields(call.args[0]):
        if dim not in field.dims:
            for result in results:
                result.append(field)
            continue
        blocks = [Labels(field.labels[(slice(None),) * dim + (slice(stop - size, stop),)])
                  for size, stop in zip(sizes, stops)]
        if len(set(sizes)) > 1:
            call.lock('it is split into parts of different sizes', field)
        elif sizes[0] and len(field.dims) == 1:
            call.balance(in_rows(field.labels, len(blocks)))
        elif sizes[0]:
            for block in blocks[1:]:
                call.tie(blocks[0], block)
        for result, block in zip(results, blocks):
            result.append(Field(block, field.dims))
    return results


@operation_rule('glu', zero='any')
def glu(call: Call) -> Candidates:
    '''Tie equal positions of both halves, of which one is the gate of the other.'''
    dim = call.dim(1, default=-1)
    result: list[Field | Labels] = []
    for field in call.fields(call.args[0]):
        if dim in field.dims:
            signal, gate = map(Labels, np.split(field.labels, 2, dim))
            call.tie(signal, gate)
            field = Field(signal, field.dims)
        result.append(field)
    return [result]


@operation_rule('slice', size_free=True)
def slice_(call: Call) -> Candidates:
    '''Lock the positions that the bounds count from, which may be hard-coded.'''
    dim, size = call.dim(1), call.args[0].shape[call.dim(1)]
    bounds = slice(call.argument(2, 'start'), call.argument(3, 'end'), call.argument(4, 'step', 1))
    start, stop, step = bounds.indices(size)
    result: list[Field | Labels] = []
    for field in call.fields(call.args[0]):
        if dim not in field.dims:
            result.append(field)
            continue
        fixed = size if step != 1 else stop if stop < size else start
        if fixed:
            counted = field.labels[(slice(None),) * dim + (slice(0, fixed),)]
            call.lock('it is sliced at fixed positions', Labels(counted))
        result.append(Field(Labels(field.labels[(slice(None),) * dim + (bounds,)]), field.dims))
    return [result]


@operation_rule('select', size_free=True)
def select(call: Call) -> Candidates:
    '''Lock the position that is picked, and all positions that its number counts from.

    Where labels also vary along other dimensions, all positions of this one are tied instead.
    '''
    dim, at = call.dim(1), call.argument(2, 'index')
    result: list[Field | Labels] = []
    for field in call.fields(call.args[0]):
        chosen = (slice(None),) * dim
        if dim in field.dims and len(field.dims) > 1:  # queries of queries, keys and values, say
            call.tie(field.labels, first(field.labels, dim))
        elif dim in field.dims:
            counted = slice(0, at + 1) if at >= 0 else slice(at, None)
            call.lock('a fixed position of it is picked', Labels(field.labels[(*chosen, counted)]))
        dims = tuple(d - (d > dim) for d in field.dims if d != dim)
        result.append(Field(Labels(field.labels[(*chosen, at if dim in field.dims else 0)]), dims))
    return [result]


@operation_rule('index')
def index(call: Call) -> Candidates:
    '''Index with tensors along dimensions that carry no labels; labels along indexed dimensions are locked.'''
    x, indices = call.args[0], list(call.args[1])
    indexed = [dim for dim, at in enumerate(indices) if at is not None]
    if any(at.dtype in (torch.bool, torch.uint8) for at in indices if at is not None):
        raise NoRule
    for at in indices:
        call.lock('it selects positions', *call.fields(at))
    result: list[Field | Labels] = []
    for field in call.fields(x):
        if set(field.dims) & set(indexed):
            call.lock('its positions are selected by a tensor', field)
            continue
        zeros = [None if at is None else torch.zeros(at.shape, dtype=torch.long, device='cpu') for at in indices]
        result.append(call.func(torch.from_numpy(field.labels), zeros).numpy())
    return [result]


@operation_rule('index_select', 'gather', 'take_along_dim')
def index_select(call: Call) -> Candidates:
    '''Lock the labels of the dimension whose positions a tensor selects.'''
    dim = call.dim(1)
    for field in call.fields(call.args[0]):
        if dim in field.dims:
            call.lock('its positions are selected by a tensor', field)
    call.lock('it selects positions', *call.fields(call.args[2]))
    kept = [field for field in call.fields(call.args[0]) if dim not in field.dims]
    if call.name != 'index_select' and kept:
        raise NoRule
    return [list(kept)]


@operation_rule('embedding')
def embedding(call: Call) -> Candidates:
    '''Lock the rows, which are looked up by number; the columns are channels.'''
    result: list[Field | Labels] = []
    for field in call.fields(call.args[0]):
        if field.dims == (1,):
            result.append(Field.along(flat(field.labels), call.outputs[0].dim() - 1, call.outputs[0].dim()))
            call.operation.producers.append(field.labels)
        else:
            call.lock('its rows are looked up by number', field)
    call.lock('it looks up rows', *call.fields(call.args[1]))
    return [result]


@operation_rule('cat', size_free=True)
def cat(call: Call) -> Candidates:
    '''Put labels along the concatenated dimension after each other, and tie labels along other dimensions.'''
    ndim, dim = call.outputs[0].dim(), call.dim(1)
    pieces = [tensor for tensor in call.args[0] if tensor.dim() == ndim]
    across = [(tuple(1 if d == dim else size for d, size in enumerate(tensor.shape)),
               [field for field in call.fields(tensor) if dim not in field.dims]) for tensor in pieces]
    along = [[field for field in call.fields(tensor) if dim in field.dims] for tensor in pieces]
    result: list[Field | Labels] = []
    dims_of: list[set[int]] = []
    for rank in range(max(map(len, along))):
        dims = set().union(*(fields[rank].dims for fields in along if len(fields) > rank))
        blocks = []
        for tensor, fields in zip(pieces, along):
            labels = fields[rank].labels if len(fields) > rank else np.zeros((1,) * ndim, np.int64)
            blocks.append(np.broadcast_to(labels, [size if d in dims else 1 for d, size in enumerate(tensor.shape)]))
        result.append(Field(Labels(np.concatenate(blocks, dim)), tuple(sorted(dims))))
        dims_of.append(dims)
    result += [field for field in combine(call, across, ndim) if not any(set(field.dims) <= dims for dims in dims_of)]
    return [result]


@operation_rule('stack', size_free=True)
def stack(call: Call) -> Candidates:
    '''Tie the labels of tensors that are stacked along a new dimension.'''
    ndim = call.outputs[0].dim()
    dim = int(call.argument(1, 'dim', 0)) % ndim
    fields = combine(call, [(tensor.shape, call.fields(tensor)) for tensor in call.args[0]], ndim - 1)
    return [[Field(Labels(np.expand_dims(field.labels, dim)), tuple(d + (d >= dim) for d in field.dims))
             for field in fields]]


@operation_rule(
    'max_pool2d_with_indices', 'max_pool3d_with_indices', 'avg_pool1d', 'avg_pool2d', 'avg_pool3d',
    '_adaptive_avg_pool1d', '_adaptive_avg_pool2d', '_adaptive_avg_pool3d', 'adaptive_max_pool2d',
    'adaptive_max_pool3d', 'upsample_nearest1d', 'upsample_nearest2d', 'upsample_nearest3d', 'upsample_linear1d',
    'upsample_bilinear2d', 'upsample_trilinear3d', 'upsample_bicubic2d', '_upsample_bilinear2d_aa',
    '_upsample_bicubic2d_aa', '_upsample_nearest_exact2d', 'grid_sampler_2d', 'reflection_pad1d', 'reflection_pad2d',
    'reflection_pad3d', 'replication_pad1d', 'replication_pad2d', 'replication_pad3d')
def spatial(call: Call) -> Candidates:
    '''Keep the labels of channels, which are pooled or resampled each by itself along the trailing dimensions.'''
    ranks = [rank for rank in (1, 2, 3) if f'{rank}d' in call.name]
    lead = call.args[0].dim() - (ranks[0] if ranks else 2)
    for tensor in tensors_in(call.args[1:]):
        call.lock('it steers a resampling', *call.fields(tensor))
    result: list[Field | Labels] = []
    for field in call.fields(call.args[0]):
        if min(field.dims) >= lead:
            call.lock(f'{call.name} runs over it', field)
        else:
            result.append(call.tie_along(field, [dim for dim in field.dims if dim >= lead]))
    return [list(result) for _ in call.outputs]


@operation_rule('logsumexp', zero='never')
@operation_rule('mean', 'sum', 'amax', 'amin', 'var', 'std', 'var_mean', 'max', 'min',
                'linalg_vector_norm', 'prod', 'any', 'all')
def reduction(call: Call) -> Candidates:
    '''Lock the labels of dimensions that are reduced, since the result would change without a channel.'''
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
            kept = Field(Labels(np.squeeze(kept.labels, tuple(dims))), tuple(position[d] for d in kept.dims))
        result.append(kept)
    return [list(result) for _ in call.outputs]


@operation_rule('_softmax', '_safe_softmax', '_log_softmax', 'logcumsumexp', zero='never')
@operation_rule('cumsum')
def softmax(call: Call) -> Candidates:
    '''Lock the labels of the dimension that is normalised over, since the result would change without a channel.'''
    dim = call.dim(1)
    result: list[Field | Labels] = []
    for field in call.fields(call.args[0]):
        if field.dims == (dim,):
            call.lock(f'{call.name.strip("_")} runs over it', field)
        else:
            result.append(call.tie_along(field, [dim]))
    return [result]
