"""The key/value cache's blocks: who holds which, and which prefix each one holds. Plain Python; no tensors here.

A block has room for `block_size` tokens' keys and values. Sequences hold blocks by reference counts. A full block is
remembered under the tokens it holds and the block before it, so that a later prompt that begins alike shares it; it
stays known after its last holder let it go, until its room is needed (least recently used first).
"""

from collections import OrderedDict
from collections.abc import Sequence

NO_PREFIX = 0  # what stands before the first block; other numbers below 0 begin prefixes of their own


class NoFreeBlocks(Exception):
    """More blocks were asked for than nobody holds."""


class BlockPool:
    """Blocks 0 to num_blocks - 1. Block 0 belongs to nobody: what padding rows write goes there."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2, "one block for padding and one to use"
        self.block_size = block_size
        self.capacity = num_blocks - 1
        self._num_holders = [0] * num_blocks
        # Free blocks, the next to be taken first: those that hold nothing known, then by the time of their release.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        # A prefix is named by a number never used twice: a name is exact where a hash could collide.
        self._block_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._prefix_of: dict[int, int] = {}
        self._last_prefix = NO_PREFIX

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, those that are still known included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.capacity - len(self._free)

    def find_prefix(self, ids: Sequence[int], root: int = NO_PREFIX) -> tuple[list[int], int]:
        """The known blocks that hold the beginning of `ids` after `root`, whole blocks only, and that prefix.

        Not held yet.
        """
        blocks: list[int] = []
        prefix = root
        for start in range(0, len(ids) - self.block_size + 1, self.block_size):
            block = self._block_of.get((prefix, tuple(ids[start : start + self.block_size])))
            if block is None:
                break
            blocks.append(block)
            prefix = self._prefix_of[block]
        return blocks, prefix

    def hold(self, blocks: Sequence[int]) -> None:
        """One more holder for each block."""
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._free[block]
            self._num_holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Blocks with one holder and nothing in them. Raises NoFreeBlocks, changing nothing."""
        if count > len(self._free):
            raise NoFreeBlocks(f"{count} blocks were asked for and {len(self._free)} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._num_holders[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each. A chain's end is free before its beginning: without it the end is of no use."""
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            assert self._num_holders[block] >= 0, f"block {block} was released more often than held"
            if self._num_holders[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)

    def remember(self, block: int, ids: Sequence[int], prefix: int) -> int:
        """Make a full block known: it holds `ids` after `prefix`. The prefix that ends with it.

        Where another block is known for the same, this one stays unknown and the other's prefix goes on.
        """
        assert block not in self._key_of, f"block {block} is known already"
        key = (prefix, tuple(ids))
        known = self._block_of.setdefault(key, block)
        if known == block:
            self._last_prefix += 1
            self._key_of[block], self._prefix_of[block] = key, self._last_prefix
        return self._prefix_of[known]

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key], self._prefix_of[block]
