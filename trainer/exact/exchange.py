"""The sum over all ranks, finished from the nodes that each rank's part of the tree has left.

Every rank gets one shard of every node, finishes the tree on its shard, and all gather the results. Communication
moves data and never adds, so the additions are those of one process.

This is done bucket by bucket: of each, the shards are on their way before the next is packed, and so are the results.

Two ranks with a node each send it whole, and both finish the tree: no more bytes than two shards, in one exchange.

On several machines there are two levels: the ranks of a machine finish their part of the tree as far as it goes, and
then those of the same place on each machine finish the rest. So what a machine has crosses the network once. The
additions are the same: the tree does not say who makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from trainer.errors import ConfigError
from trainer.exact.plan import Step
from trainer.exact.tree import Node, TreeSum, nodes_of_range
from trainer.process.levels import Level
from trainer.process.ranks import Ranks

# Of each node: lists of tensors whose sum it is, added up in this order.
Terms = list[list[Tensor]]

BUCKET_BYTES = 25 << 20  # as large as DDP's own
# What is exchanged last has nothing left to hide behind.
LAST_BUCKET_BYTES = 1 << 20


class ShardExchange:
    """Sums lists of tensors over all ranks by the tree of a step.

    `layout` is a list of tensors with the shapes, strides and the one dtype of those that are summed. Raises
    `ConfigError` where it has several dtypes.

    `sum` does all of it. `start` may begin with single buckets before: every rank starts all of them, in their order.
    """

    def __init__(
        self,
        ranks: Ranks,
        layout: Sequence[Tensor],
        buckets: Sequence[Sequence[int]] | None = None,
    ) -> None:
        dtype = _common_dtype(layout)
        self._ranks = ranks
        self._count = len(layout)
        self.buckets = buckets or [range(len(layout))]
        self._exchanges = []
        for bucket in self.buckets:
            of_bucket = _take(layout, bucket)
            self._exchanges.append(_BucketExchange(ranks, of_bucket, dtype))
        self._started = 0

    @property
    def next_bucket(self) -> Sequence[int]:
        """The indices of those tensors that `start` sends next."""
        return self.buckets[self._started]

    def start(self, step: Step, nodes: Sequence[Terms]) -> None:
        """Send the next bucket of this rank's `nodes`. A collective that waits for nobody."""
        bucket = self.next_bucket
        of_bucket = []
        for terms in nodes:
            of_bucket.append([_take(term, bucket) for term in terms])
        exchange = self._exchanges[self._started]
        exchange.start(step, of_bucket)
        self._started += 1

    def sum(self, step: Step, nodes: Sequence[Terms]) -> list[Tensor]:
        """The root of the step's tree, from this rank's `nodes`; what has been started is not sent again.

        A collective.
        """
        while self._started < len(self._exchanges):
            self.start(step, nodes)
        self._started = 0
        # All are on their way before the first is waited for.
        waits = [exchange.finish_tree(step) for exchange in self._exchanges]
        total: list[Tensor | None] = [None] * self._count
        for bucket, wait in zip(self.buckets, waits, strict=True):
            tensors = wait()
            for index, tensor in zip(bucket, tensors, strict=True):
                total[index] = tensor
        return [tensor for tensor in total if tensor is not None]


def _take(tensors: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
    return [tensors[index] for index in indices]


def buckets_of(parameters: Sequence[Tensor], count: int) -> list[list[int]]:
    """Cut the first of `count` tensors, which are `parameters`, into buckets in the order of a backward.

    A backward ends with the first layers, so their bucket is the last, and small; all other tensors are in it.
    """
    size = 0
    first = 0  # of those that are not in the last bucket
    while first < len(parameters) and size < LAST_BUCKET_BYTES:
        size += parameters[first].nbytes
        first += 1
    buckets: list[list[int]] = []
    size = BUCKET_BYTES  # full: the first parameter begins a bucket
    for index in reversed(range(first, len(parameters))):
        if size >= BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(index)
        size += parameters[index].nbytes
    first_layers = range(first)
    others = range(len(parameters), count)
    return [*buckets, [*first_layers, *others]]


class _BucketExchange:
    """The exchange of some tensors that are packed into one."""

    def __init__(
        self, ranks: Ranks, layout: Sequence[Tensor], dtype: torch.dtype
    ) -> None:
        self._ranks = ranks
        self._memory_orders = [_memory_order(tensor) for tensor in layout]
        self._sizes = [tensor.numel() for tensor in layout]
        self._size = sum(self._sizes)
        # The same of every rank, though the last shard may then have less to hold.
        self._shard_size = math.ceil(self._size / ranks.count)
        self._dtype = dtype
        self._buffers: dict[str, Tensor] = {}
        # By the address of what was unpacked. The same memory is unpacked in every step.
        self._views: dict[int, list[Tensor]] = {}
        self._received: Callable[[], Tensor]

    def start(self, step: Step, nodes: Sequence[Terms]) -> None:
        """Send the members of the first level their shards of this rank's `nodes`, or its only node."""
        level = self._ranks.levels[0]
        if _sends_whole_nodes(step, level):
            (only_node,) = nodes
            self._received = self._send_node(level, only_node)
        else:
            packed = self._pack(nodes)
            self._received = self._send_shards(step, level, packed)

    def finish_tree(self, step: Step) -> Callable[[], list[Tensor]]:
        """Wait for the shards, finish the tree on them, and spread it: the function returned waits for the result."""
        first, *others = self._ranks.levels
        nodes = self._finish_part(step, first, self._received())
        if _sends_whole_nodes(step, first):
            (root,) = nodes
            return lambda: self._unpack(root)
        for level in others:
            received = self._send_shards(step, level, nodes)
            nodes = self._finish_part(step, level, received())
        (total,) = nodes  # the root, of which this rank has one shard
        for level in reversed(others):
            wait_for_level = self._spread(level, total)
            total = wait_for_level().view(-1)
        wait_for_all = self._spread(first, total)
        return lambda: self._unpack(wait_for_all())

    def _pack(self, nodes: Sequence[Terms]) -> list[Tensor]:
        """This rank's nodes, each of `(ranks · shard size,)`. The last shard may have some elements to spare."""
        size = self._ranks.count * self._shard_size
        packed = self._buffer("packed", len(nodes), size)
        rows = list(packed)
        for row, terms in zip(rows, nodes, strict=True):
            self._pack_node(row, terms)
        return rows

    def _pack_node(self, row: Tensor, terms: Terms) -> None:
        """Put the sum of `terms` into `row`."""
        first, *others = terms
        parts = self._unpack(row)
        torch._foreach_copy_(parts, first)
        for term in others:
            torch._foreach_add_(parts, term)

    def _send_node(self, level: Level, terms: Terms) -> Callable[[], Tensor]:
        """Start to send all members this rank's only node.

        The function returned waits for the nodes of all members, `(members, elements)`.
        """
        nodes = self._buffer("nodes", len(level.members), self._size)
        own_place = level.members.index(self._ranks.rank)
        own = nodes[own_place]
        self._pack_node(own, terms)
        wait_for_all = self._ranks.all_gather_by_sends_async(own, nodes, level)

        def wait() -> Tensor:
            wait_for_all()
            return nodes

        return wait

    def _finish_part(self, step: Step, level: Level, shards: Tensor) -> list[Tensor]:
        """What the tree has left once the nodes of all members are summed, of this rank's shard of each."""
        tree_sum: TreeSum[Tensor] = TreeSum(len(step.micro_batches), Tensor.add_)
        nodes: list[Node] = []
        for nodes_of_member in _nodes_by_member(step, level):
            nodes += nodes_of_member
        for node, shard in zip(nodes, shards, strict=True):
            tree_sum.push(node, shard)
        return [shard for _, shard in tree_sum.nodes]

    def _send_shards(
        self, step: Step, level: Level, nodes: list[Tensor]
    ) -> Callable[[], Tensor]:
        """Start to exchange shards of all members' nodes, which are `(elements,)`.

        The function returned waits for this rank's shards, `(nodes of all members, elements / members)`, in the
        members' order.
        """
        members = len(level.members)
        # The levels before this one have shared the nodes out over `span` ranks.
        width = self._ranks.count * self._shard_size // level.span
        shard_size = width // members
        size_for_each = len(nodes) * shard_size
        # One call for all members' shards: the first dimension must be that of the members.
        if len(nodes) == 1:
            sent = nodes[0]
        else:
            sent = self._buffer(f"sent {level.span}", members, size_for_each)
            shards = [node.view(members, shard_size) for node in nodes]
            if shards:  # a rank without micro-batches has none
                torch.cat(shards, dim=1, out=sent)
        counts = [len(nodes) for nodes in _nodes_by_member(step, level)]
        received = self._buffer(f"received {level.span}", sum(counts), shard_size)
        work: Any = distributed.all_to_all_single(
            received.view(-1),
            sent.view(-1),
            output_split_sizes=[count * shard_size for count in counts],
            input_split_sizes=[size_for_each] * members,
            group=level.group,
            async_op=True,
        )

        def wait() -> Tensor:
            work.wait()
            return received

        return wait

    def _spread(self, level: Level, shard: Tensor) -> Callable[[], Tensor]:
        """Start to give all members this rank's `shard`, `(n,)`; the function returned waits for all of them."""
        shards = self._buffer(f"total {level.span}", len(level.members), len(shard))
        wait_for_all = self._ranks.all_gather_by_sends_async(shard, shards, level)

        def wait() -> Tensor:
            wait_for_all()
            return shards

        return wait

    def _unpack(self, packed: Tensor) -> list[Tensor]:
        """Views of the tensors that `packed` has in a row."""
        address = packed.data_ptr()
        views = self._views.get(address)
        if views is None:
            flat = packed.view(-1)[: self._size]
            flat_tensors = torch.split(flat, self._sizes)
            views = list(map(_unflatten, flat_tensors, self._memory_orders))
            self._views[address] = views
        return views

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Memory that is kept from step to step: allocating it anew costs as much as filling it."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=self._dtype, device=self._ranks.device)
            self._buffers[name] = buffer
            self._views.clear()  # some may be of the smaller buffer
        return buffer[:size].view(shape)


def _nodes_by_member(step: Step, level: Level) -> list[list[Node]]:
    """The nodes that each member of the level has of the step's tree."""
    nodes_by_member = []
    for member in level.members:
        # Above the first level a member stands for `span` neighbouring ranks, whose nodes are already one part.
        first_rank = member - member % level.span
        last_rank = first_rank + level.span - 1
        first, _ = step.ranks[first_rank]
        _, end = step.ranks[last_rank]
        nodes = nodes_of_range(first, end, len(step.micro_batches))
        nodes_by_member.append(nodes)
    return nodes_by_member


def _sends_whole_nodes(step: Step, level: Level) -> bool:
    """True for two ranks in all, each of which has one node of the step's tree: all ranks decide alike.

    Then whole nodes are as many bytes as two shards, and there is nothing to spread.
    """
    if len(level.members) != 2 or len(step.ranks) != 2:
        return False
    return all(len(nodes) == 1 for nodes in _nodes_by_member(step, level))


class _MemoryOrder(NamedTuple):
    """The sizes of a tensor's dimensions from the largest stride to the smallest, and how to put them back in order."""

    sizes: list[int]
    dims: list[int]


def _memory_order(tensor: Tensor) -> _MemoryOrder:
    strides = tensor.stride()
    dimensions = range(tensor.dim())
    order = sorted(dimensions, key=strides.__getitem__, reverse=True)
    sizes = [tensor.shape[dim] for dim in order]
    dims = [order.index(dim) for dim in dimensions]
    return _MemoryOrder(sizes, dims)


def _unflatten(flat: Tensor, order: _MemoryOrder) -> Tensor:
    """A view of `flat`, `(n,)`, with the shape and the memory order of a tensor.

    A norm sums in memory order, so a channels_last gradient must come back as one.
    """
    return flat.view(order.sizes).permute(order.dims)


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ConfigError(
            "run.reproducibility",
            f"bitwise needs parameters of one dtype, and the model has {names}",
        )
    return dtypes.pop()
