'''The rules of operations with weights, which sum over one dimension of the weight and produce another.

Matrix products and convolutions tie the channels that flow in to the dimension of the weight that reads them, and give
the result the labels of the dimension that produces it. Norms and attention are here too.
'''
from __future__ import annotations

import numpy as np
import torch

from ..util._networks import tensors_in
from ._labels import BlockField, Field, Labels, first, flat, in_rows
from ._operations import combine
from ._rules import KERNEL, Call, Candidates, operation_rule

NO_PARTNER = 'it is multiplied with something of fixed size'


def contract(call: Call, left: Labels, left_tensor: torch.Tensor, right: Labels, right_tensor: torch.Tensor) -> None:
    '''Tie two contracted dimensions, and note which side is a weight.

    A channel is masked by zeroing the weight that reads it. Where neither side is a weight, one side must be zero
    whenever the weights that produce it are; the labels are locked otherwise.
    '''
    call.tie(left, right)
    call.operation.contracted.append(left)
    sides = [labels for labels, tensor in ((left, left_tensor), (right, right_tensor)) if call.is_weight(tensor)]
    (call.operation.consumers if sides else call.operation.paired).extend(sides or [left])
    for labels, tensor in ((left, left_tensor), (right, right_tensor)):
        if call.is_weight(tensor) and not call.tracer.is_view_of_parameter(tensor):
            call.lock('the weight that reads it is computed from parameters', labels)
    if not sides and not (call.tracer.vanishes(left_tensor) or call.tracer.vanishes(right_tensor)):
        call.lock('activations are multiplied that are not zero where their weights are', left, right)


def produce(call: Call, tensor: torch.Tensor, labels: Labels) -> None:
    '''Note that ``tensor``, if it is a weight, produces the channels ``labels``.'''
    if call.is_weight(tensor):
        call.operation.producers.append(labels)


def product(call: Call, left: torch.Tensor, right: torch.Tensor) -> list[Field]:
    '''Return the fields of ``left @ right``, (..., n, k) times (..., k, m), where batch dimensions are equal.

    Labels that vary along matrices and within them, as those of the heads of attention do, are tied so that all
    matrices lose the same rows or columns, or, where the trace was asked for it, so that whole matrices are removed.
    '''
    ndim = left.dim()
    row, column = ndim - 2, ndim - 1
    result: list[Field] = []
    contracted: list[list[Field]] = [[], []]
    fields = [call.fields(tensor) for tensor in (left, right)]
    joint = [field for found in fields for field in found if min(field.dims) < row <= max(field.dims)]
    call.operation.joint += [field.labels for field in joint]
    if joint and call.decide('whole matrices', call.operation.site in call.tracer.whole):
        fields = [[call.tie_along(field, (row, column)) if field in joint else field for field in found]
                  for found in fields]
    for side, (tensor, inner, outer) in enumerate(((left, column, row), (right, row, column))):
        for field in fields[side]:
            if inner not in field.dims:
                result.append(field)
                if outer in field.dims:
                    produce(call, tensor, field.labels)
            elif outer in field.dims:
                call.lock('it varies along both dimensions of a matrix', field)
            else:
                labels = np.swapaxes(field.labels, row, column) if side else field.labels
                contracted[side].append(Field(Labels(labels), field.dims))
    if all(contracted):
        for a in contracted[0]:
            for b in contracted[1]:
                contract(call, a.labels, left, b.labels, right)
    else:
        call.lock(NO_PARTNER, *contracted[0], *contracted[1])
    if row > 0:
        combine(call, [(tensor.shape[:-2], _batch_fields(call, tensor, found))
                       for tensor, found in zip((left, right), fields)], row)
    return result


def _batch_fields(call: Call, tensor: torch.Tensor, fields: list[Field]) -> list[Field]:
    '''Return the labels of a stack of matrices along its batch dimensions; other labels are tied along these.'''
    row = tensor.dim() - 2
    result = []
    for field in fields:
        if max(field.dims) < row:
            result.append(Field(Labels(field.labels[..., 0, 0]), field.dims))
        else:
            call.tie_along(field, range(row))
    return result


@operation_rule('mm', 'bmm', zero='any')
def matmul(call: Call) -> Candidates:
    '''Apply the rule of a matrix product.'''
    return [list(product(call, call.args[0], call.args[1]))]


@operation_rule('addmm', zero='bias')
@operation_rule('baddbmm')
def addmm(call: Call) -> Candidates:
    '''Apply the rule of a matrix product, and tie the bias that is added to it.'''
    bias, left, right = call.args[:3]
    out = call.outputs[0]
    return [list(combine(call, [(bias.shape, call.fields(bias)), (out.shape, product(call, left, right))], out.dim()))]


@operation_rule('convolution', zero='any')
@operation_rule('_convolution')
def convolution(call: Call) -> Candidates:
    '''Apply the rule of a dense, a depthwise or a grouped convolution.'''
    x, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    outgoing: Labels | None = None
    incoming: Labels | None = None
    flowing = call.vector(x, 1)
    per_group = weight.shape[in_dim] // (groups if transposed else 1)
    kind = call.decide('kind', 'dense' if groups == 1 else 'depthwise' if per_group == 1 else 'grouped')
    for field in call.fields(weight):
        if field.dims == (out_dim,):
            outgoing = flat(field.labels)
        elif field.dims == (in_dim,):
            incoming = flat(field.labels)
        elif isinstance(field, BlockField) and kind == 'grouped':
            if transposed:
                outgoing = flat(field.blocks(groups))
            else:
                incoming = field.blocks(groups)
        else:
            call.lock(KERNEL, field)
    if kind == 'dense':
        if flowing is None or incoming is None:
            call.lock(NO_PARTNER, *(labels for labels in (flowing, incoming) if labels is not None))
        else:
            contract(call, flowing, x, incoming, weight)
        if outgoing is not None:
            produce(call, weight, outgoing)
    elif not call.tracer.is_parameter(weight):
        call.lock('the weight of a grouped convolution is computed',
                  *(labels for labels in (flowing, outgoing, incoming) if labels is not None))
        outgoing = None
    elif kind == 'depthwise':
        if transposed:  # the weight has a row for each group, and of that a column for each of its outputs
            columns = None if incoming is None else Labels(np.repeat(incoming, weight.shape[1]))
            incoming, outgoing = outgoing, columns
        outgoing = _depthwise(call, flowing, outgoing, incoming, groups, weight)
    else:
        if transposed and outgoing is not None and len(outgoing) == weight.shape[1]:
            outgoing = Labels(np.tile(outgoing, groups))  # no module knows that it is grouped
        outgoing = _grouped(call, flowing, outgoing, incoming, groups, x, weight)
    if bias is not None:
        for field in call.fields(bias):
            if outgoing is None:
                call.lock('one output channel a group' if kind == 'grouped' else 'its weight is locked', field)
            else:
                call.tie(flat(field.labels), outgoing)
        if outgoing is not None and not call.fields(bias) and bias.shape[0] > 1:
            call.lock('its bias has a fixed size', outgoing)
    return [[] if outgoing is None else [Field.along(outgoing, 1, call.outputs[0].dim())]]


def _depthwise(call: Call, flowing: Labels | None, outgoing: Labels | None, incoming: Labels | None, groups: int,
               weight: torch.Tensor) -> Labels | None:
    '''Tie each group of a depthwise convolution to its only input channel.'''
    if incoming is not None:
        call.lock('one input channel a group', incoming)
    if flowing is None or outgoing is None:
        call.lock(NO_PARTNER, *(labels for labels in (flowing, outgoing) if labels is not None))
        return outgoing
    blocks = in_rows(outgoing, groups)
    call.tie(blocks, first(blocks, 1))
    call.tie(in_rows(flowing, groups), first(blocks, 1))
    call.tracer.keep_group_size(weight, weight.shape[0] // groups)
    return outgoing


def _grouped(call: Call, flowing: Labels | None, outgoing: Labels | None, incoming: Labels | None, groups: int,
             x: torch.Tensor, weight: torch.Tensor) -> Labels | None:
    '''Let every group of a grouped convolution lose equally many channels; the number of groups stays.

    Where the weight belongs to no module, its labels are not known by block, and every group loses equal positions.
    '''
    if flowing is None or incoming is None:
        call.lock(NO_PARTNER, *(labels for labels in (flowing, incoming) if labels is not None))
    else:
        contract(call, in_rows(flowing, groups), x, in_rows(incoming, incoming.size * groups // flowing.size), weight)
        call.balance(in_rows(flowing, groups))
    if outgoing is not None:
        blocks = in_rows(outgoing, groups)
        if call.decide('one output channel a group', blocks.shape[1] == 1):
            call.lock('one output channel a group', outgoing)
        else:
            call.balance(blocks)
        produce(call, weight, outgoing)
    return outgoing


@operation_rule('_weight_norm_interface')
def weight_norm(call: Call) -> Candidates:
    '''Lock the inputs of a filter, whose norm would change; ``_parametrized.py`` narrows what it can.'''
    for tensor in call.args[:2]:
        call.lock('the norm of a weight runs over it', *call.fields(tensor))
    return [list(call.fields(call.args[0])), list(call.fields(call.args[1]))]


@operation_rule('batch_norm', 'native_batch_norm', 'cudnn_batch_norm', '_native_batch_norm_legit',
                '_native_batch_norm_legit_no_training', '_batch_norm_no_update', '_batch_norm_with_update')
def batch_norm(call: Call) -> Candidates:
    '''Tie weight, bias and statistics to the channels.'''
    x = call.args[0]
    training = next((value for value in call.args[5:] if isinstance(value, bool)),
                    call.name != '_native_batch_norm_legit_no_training')
    if training:
        for field in call.fields(x):
            if 1 not in field.dims:
                call.lock('its batch statistics run over it', field)
    call.decide('statistics of the batch', training)
    flowing = call.vector(x, 1)
    for tensor in call.args[1:5]:
        if isinstance(tensor, torch.Tensor):
            for field in call.fields(tensor):
                if flowing is None:
                    call.lock('it normalises something of fixed size', field)
                else:
                    call.tie(flat(field.labels), flowing)
            if not call.fields(tensor) and flowing is not None and tensor.shape[0] > 1:
                call.lock('its statistics have a fixed size', flowing)
    statistics: list[Field | Labels] = [] if flowing is None else [Field(flowing, (0,))]
    return [list(call.fields(x)),
            *(list(statistics) if tensor.shape == (x.shape[1],) else [] for tensor in call.outputs[1:])]


@operation_rule('native_layer_norm', sized=True)
def layer_norm(call: Call) -> Candidates:
    '''Lock the channels that LayerNorm runs over, or with ``layernorm='surviving'`` keep their labels.

    Removing a channel changes the statistics of all others. Statistics over the surviving channels can be had in a
    masked network where LayerNorm is called from Python. Labels that also vary along dimensions that are not
    normalised, as the widths of several heads do, are removed along these only.
    '''
    x, lead = call.args[0], call.args[0].dim() - len(call.args[1])
    call.decide('normalised dimensions', len(call.args[1]))
    fields = [call.tie_along(field, range(lead, x.dim())) if min(field.dims) < lead else field
              for field in call.fields(x)]
    weights = tensors_in(call.args[2:4])
    operands = [(x.shape, fields), *((tensor.shape, call.fields(tensor)) for tensor in weights)]
    if call.tracer.layernorm == 'surviving' and call.operation.site.function == 'layer_norm':
        fields = combine(call, operands, x.dim())
    else:
        call.lock('LayerNorm runs over it', *(field for _, found in operands for field in found
                                              if field.labels.ndim < x.dim() or min(field.dims) >= lead))
    outer = [field for field in fields if max(field.dims) < lead]
    return [list(fields), *(list(outer) if tensor.dim() == x.dim() else [] for tensor in call.outputs[1:])]


@operation_rule('native_group_norm', sized=True)
def group_norm(call: Call) -> Candidates:
    '''Tie the channels of each group, over which statistics run, so that whole groups are removed.'''
    x, weight, bias, groups = call.args[0], call.args[1], call.args[2], call.args[6]
    flowing = call.vector(x, 1)
    statistics: list[Field | Labels] = []
    if flowing is not None:
        blocks = in_rows(flowing, groups)
        call.tie(blocks, first(blocks, 1))
        statistics.append(Field.along(first(blocks, 1), 1, 2))
        if weight is None or not call.tracer.is_parameter(weight):
            call.lock('GroupNorm without weights keeps its number of channels', flowing)
        else:
            call.tracer.keep_group_size(weight, blocks.shape[1])
    for tensor in tensors_in((weight, bias)):
        for field in call.fields(tensor):
            if flowing is None:
                call.lock('it normalises something of fixed size', field)
            else:
                call.tie(flat(field.labels), flowing)
    return [list(call.fields(x))] + [list(statistics) for _ in call.outputs[1:]]


@operation_rule('_scaled_dot_product_flash_attention_for_cpu', '_scaled_dot_product_efficient_attention',
                '_scaled_dot_product_flash_attention', '_scaled_dot_product_fused_attention_overrideable',
                '_scaled_dot_product_cudnn_attention', '_scaled_dot_product_attention_math')
def attention(call: Call) -> Candidates:
    '''Contract queries and keys over their width, and give the result the width of the values.'''
    query, key, value = call.args[:3]
    last = query.dim() - 1
    for tensor in tensors_in((call.args[3:], call.kwargs)):
        call.lock('it masks attention', *call.fields(tensor))
    widths: list[list[Field]] = []
    for tensor in (query, key, value):
        widths.append([call.tie_along(field, range(last)) for field in call.fields(tensor) if last in field.dims])
        call.lock('attention runs over it', *(field for field in call.fields(tensor) if last not in field.dims))
    queries, keys, values = widths
    if call.kwargs.get('scale') is None:
        call.lock('the default scale of attention depends on it', *queries, *keys)
    elif queries and keys:
        contract(call, queries[0].labels, query, keys[0].labels, key)
    else:
        call.lock(NO_PARTNER, *queries, *keys)
    return [list(values)] + [[] for _ in call.outputs[1:]]
