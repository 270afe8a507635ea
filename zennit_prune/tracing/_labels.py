'''Label fields say which removable channel sits where in a tensor.

Every index of every dimension of every parameter and buffer carries an integer *label*. A tensor computed from them
carries :class:`Field` objects: arrays of labels that broadcast to the tensor's shape. Removing a channel deletes, in
every tensor, the positions that bear its labels. Label 0 marks positions that must stay.

Four kinds of numbers, each an int64 array and a type of its own, say which channel is meant, and where::

    Labels  -------- solution.channel -------->  Channels  -- solution.group -->  number of the group
       |    <-- flatnonzero(channel == c) ---       |
       |                                            |  group.channels[position] == channel
       |  label - axis.start                        |
       v                                            v
    Indices  <---- member.index[position] ----   Positions

A label is one index of one dimension of one parameter in the trace; a channel, all labels that go together, by its
number in the whole network; a position, the place of a channel in its group; an index, a place along a dimension of a
parameter, as ``tensor.index_select`` takes it.
'''
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NewType, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]
Labels = NewType('Labels', Array)
Channels = NewType('Channels', Array)
Positions = NewType('Positions', Array)
Kind = TypeVar('Kind', bound=Array)


class Field:
    '''The labels of a tensor along some of its dimensions.

    Two positions of a tensor that bear equal labels belong to one channel and are removed together.

    Parameters
    ----------
    labels: numpy.ndarray
        An array of int64 with as many dimensions as the tensor, of size 1 along every dimension that is not in
        ``dims``: a dimension along which labels do not vary is never materialised. Label 0 marks positions that must
        stay.
    dims: tuple of int
        The dimensions along which the labels vary, ascending. A dimension of size 1 is listed where it was narrowed to
        a single channel.

    Examples
    --------
    The weight of a linear layer with three outputs and two inputs has a field along each of its dimensions:

    >>> import numpy as np
    >>> from zennit_prune.tracing import Field
    >>> rows = Field.along(np.array([1, 2, 3]), 0, 2)
    >>> columns = Field.along(np.array([4, 5]), 1, 2)
    >>> rows, columns
    (Field(shape=(3, 1), dims=(0,)), Field(shape=(1, 2), dims=(1,)))

    A batch of its outputs bears the labels of the rows along the last dimension:

    >>> Field.along(rows.labels.reshape(-1), 1, 2)
    Field(shape=(1, 3), dims=(1,))
    '''

    __slots__ = ('dims', 'labels')

    @property
    def narrowing(self) -> tuple[int, ...]:
        '''The dimensions that shrink when labels are removed.'''
        return self.dims

    def __init__(self, labels: Labels, dims: tuple[int, ...]):
        self.labels = labels
        self.dims = dims

    @classmethod
    def along(cls, labels: Labels, dim: int, ndim: int) -> Field:
        '''Lay one-dimensional labels along one dimension of a tensor.

        Parameters
        ----------
        labels: numpy.ndarray
            An array of int64 of shape (size of the dimension,).
        dim: int
            The dimension.
        ndim: int
            The number of dimensions of the tensor.

        Returns
        -------
        Field
            A field that varies along ``dim`` only.
        '''
        return cls(Labels(labels.reshape([-1 if d == dim else 1 for d in range(ndim)])), (dim,))

    def aligned(self, ndim: int) -> Field:
        '''Add leading dimensions of size 1, as broadcasting does.

        Parameters
        ----------
        ndim: int
            The number of dimensions that the tensor is broadcast to.

        Returns
        -------
        Field
            The field on the tensor of ``ndim`` dimensions.

        Examples
        --------
        >>> import numpy as np
        >>> from zennit_prune.tracing import Field
        >>> Field.along(np.array([1, 2, 3]), 0, 1).aligned(2)
        Field(shape=(1, 3), dims=(1,))
        '''
        extra = ndim - self.labels.ndim
        if not extra:
            return self
        return Field(Labels(self.labels.reshape((1,) * extra + self.labels.shape)), tuple(d + extra for d in self.dims))

    def __repr__(self) -> str:
        return f'Field(shape={self.labels.shape}, dims={self.dims})'


class BlockField(Field):
    '''The labels of the input channels that the weight of a grouped convolution reads.

    The weight has the shape (outputs, inputs per group, ...). The outputs of one group form a block of dimension 0, and
    an index of dimension 1 means another channel in each block: the labels vary along both dimensions. Indices of
    dimension 1 are removed within their block, equally many in each block. The weight of a transposed convolution has
    the shape (inputs, outputs per group, ...), and the labels are those of its output channels.

    Parameters
    ----------
    labels: numpy.ndarray
        An array of int64 of shape (outputs, inputs per group, 1, ...).
    '''

    __slots__ = ()

    def __init__(self, labels: Labels):
        super().__init__(labels, (0, 1))

    @property
    def narrowing(self) -> tuple[int, ...]:
        return (1,)

    @classmethod
    def of_blocks(cls, rows: Labels, shape: tuple[int, ...]) -> BlockField:
        '''Make the field of a weight of this shape from one row of labels for each block.'''
        labels = np.repeat(rows, shape[0] // len(rows), 0)
        return cls(Labels(labels.reshape(labels.shape + (1,) * (len(shape) - 2))))

    def blocks(self, count: int) -> Labels:
        '''Return the labels of each of ``count`` blocks, an array of shape (count, inputs per group).'''
        return Labels(self.labels.reshape(count, -1, self.labels.shape[1])[:, 0])

    def without(self, gone: npt.NDArray[np.bool_]) -> BlockField | None:
        '''Return the field without the labels ``gone``, or None where its blocks lose different numbers.'''
        lost = gone[self.labels].sum(1)
        if (lost != lost[:1]).any():
            return None
        return BlockField(Labels(self.labels[~gone[self.labels]].reshape(len(lost), -1, *self.labels.shape[2:])))


def same(left: Array, right: Array) -> bool:
    '''Return ``numpy.array_equal(left, right)``, computed faster for short arrays.'''
    return left is right or (left.shape == right.shape and left.tobytes() == right.tobytes())


def every(flags: npt.NDArray[np.bool_]) -> bool:
    '''Return ``flags.all()``, computed faster for short arrays.'''
    return b'\0' not in flags.tobytes()


def flat(labels: Labels) -> Labels:
    '''Return the labels in one row.'''
    return Labels(labels.reshape(-1))


def in_rows(labels: Labels, count: int) -> Labels:
    '''Return the labels in ``count`` rows of equal length.'''
    return Labels(labels.reshape(count, -1))


def first(array: Kind, dim: int) -> Kind:
    '''Return the slice of size 1 at the start of dimension ``dim``.'''
    return array[(slice(None),) * dim + (slice(0, 1),)]  # type: ignore[return-value]  # a part is of the same kind


def varies(array: Array, dim: int) -> bool:
    '''Return whether the labels differ along dimension ``dim``.'''
    if array.shape[dim] < 2 or array.strides[dim] == 0:
        return False
    corner = [0] * array.ndim
    corner[dim] = -1  # mostly the two ends say it already
    return array[tuple(corner)] != array[(0,) * array.ndim] or bool((array != first(array, dim)).any())


def varying_dims(array: Array) -> tuple[int, ...]:
    '''Return the dimensions along which the labels differ.'''
    if 0 in array.strides:
        array = array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)]
    return tuple(dim for dim in range(array.ndim) if varies(array, dim))


def narrowed_to(array: Labels, dims: Sequence[int]) -> Labels:
    '''Drop, to size 1, every dimension that is not in ``dims``.'''
    for dim in range(array.ndim):
        if dim not in dims and array.shape[dim] > 1:
            array = first(array, dim)
    return array


def reshaped(field: Field, old: Sequence[int], new: Sequence[int]) -> Labels:
    '''Return the labels of a tensor of shape ``old`` after it was reshaped to ``new``.

    Dimensions are divided into the smallest groups whose sizes multiply to the same number before and after; a group
    without varying labels stays of size 1, so that a large spatial extent costs nothing.
    '''
    source: list[int] = []
    target: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start, stop = i, j
        size_old, i = (old[i], i + 1) if i < len(old) else (1, i)
        size_new, j = (new[j], j + 1) if j < len(new) else (1, j)
        while size_old != size_new:
            if size_old < size_new:
                size_old, i = size_old * old[i], i + 1
            else:
                size_new, j = size_new * new[j], j + 1
        if any(start <= dim < i for dim in field.dims):
            source += old[start:i]
            target += new[stop:j]
        else:
            source += [1] * (i - start)
            target += [1] * (j - stop)
    return Labels(np.broadcast_to(field.labels, source).reshape(target))


def joined(component: Labels, ties: Iterable[tuple[Labels, Labels]]) -> Labels:
    '''Merge connected components of labels along further ties.

    Most ties meet labels that nothing was tied to before: these are given the component of the other side at once. The
    ties that remain are resolved by hooking to the minimum with pointer jumping. Label 0 is tied to nothing.

    Parameters
    ----------
    component: numpy.ndarray
        For each label, the smallest label of its component so far, which is its own where it is tied to no other.
    ties: iterable of pairs of numpy.ndarray
        Pairs of arrays that broadcast; labels at equal positions belong to one component.

    Returns
    -------
    numpy.ndarray
        For each label, the smallest label of its component.
    '''
    parent: Array = component.copy()
    alone = np.bincount(component, minlength=len(component))[component] == 1
    real = np.ones(len(component), bool)
    alone[0] = real[0] = False
    rest: list[Array] = []
    left: Array
    right: Array
    for left, right in ties:
        if left.shape != right.shape:
            left, right = np.broadcast_arrays(left, right)
        left, right = left.reshape(-1), right.reshape(-1)
        if not (every(real[left]) and every(real[right])):
            both = real[left] & real[right]
            left, right = left[both], right[both]
        if not every(alone[left]):
            left, right = right, left
        roots = parent[right]
        if every(alone[left]):
            parent[left] = roots
            if not same(parent[roots], roots):  # a label is on both sides
                parent[left] = left
        if not same(parent[left], roots):  # or comes twice
            apart = parent[left] != roots
            rest.append(np.stack([left[apart], right[apart]]))
        alone[left] = alone[right] = False
    edges = np.concatenate(rest, 1) if rest else np.zeros((2, 0), np.int64)
    while edges.shape[1]:
        left, right = parent[edges[0]], parent[edges[1]]
        apart = left != right
        edges, left, right = edges[:, apart], left[apart], right[apart]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
        while not np.array_equal(grand := parent[parent], parent):
            parent = grand
    smallest = np.empty_like(parent)
    smallest[parent[::-1]] = np.arange(len(parent))[::-1]  # what is written last stays
    return Labels(smallest[parent])


def flat_pairs(pairs: Iterable[tuple[Array, Array]]) -> Labels:
    '''Return all ties as one array of shape (2, number of ties), without those of a label with itself.'''
    lefts, rights = [], []
    for left, right in pairs:
        if left.shape != right.shape:
            shape = np.broadcast_shapes(left.shape, right.shape)
            left, right = np.broadcast_to(left, shape), np.broadcast_to(right, shape)
        lefts.append(left.reshape(-1))
        rights.append(right.reshape(-1))
    if not lefts:
        return Labels(np.zeros((2, 0), np.int64))
    edges = np.stack([np.concatenate(lefts), np.concatenate(rights)])
    return Labels(edges[:, edges[0] != edges[1]])
