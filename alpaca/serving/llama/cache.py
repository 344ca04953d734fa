"""The blocks of the key/value cache: who holds them, and what each one holds. Plain Python, no tensors.

A block has room for the keys and values of `block_size` tokens. It is free when no sequence holds it. A full block is
remembered under its tokens and the prefix before them, so that a later prompt with the same beginning shares it. It is
still remembered while it is free, until its room is needed; the blocks that were freed first are used first.

A prefix is a number. It stands for all tokens from a sequence's beginning to the end of one block.
"""

from collections import OrderedDict
from collections.abc import Sequence

NO_PREFIX = 0  # the empty prefix; negative numbers are empty prefixes apart, such as one for each adapter


class NoFreeBlocks(Exception):
    """More blocks were asked for than are free."""


class BlockPool:
    """Blocks 0 to num_blocks - 1. Block 0 is never given out: padding rows write into it.

    capacity: the blocks that can be given out.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2, "one block for padding and one to use"
        self.block_size = block_size
        self.capacity = num_blocks - 1
        self._num_holders = [0] * num_blocks
        # Free blocks, in the order they are taken: first those that are not remembered, then those released first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        # Each new prefix gets a number that was never used before. Unlike hashes, such numbers cannot collide.
        self._block_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._prefix_of: dict[int, int] = {}
        self._last_prefix = NO_PREFIX

    @property
    def num_free(self) -> int:
        """Number of free blocks, those that are still remembered included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Number of blocks that some sequence holds."""
        return self.capacity - len(self._free)

    def find_prefix(self, token_ids: Sequence[int], root: int = NO_PREFIX) -> tuple[list[int], int]:
        """The remembered blocks with the longest beginning of `token_ids`, and the prefix that they make up.

        root: the empty prefix to begin with. The caller must `hold` the blocks before it allocates any.
        """
        blocks: list[int] = []
        prefix = root
        for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
            block = self._block_of.get((prefix, tuple(token_ids[start : start + self.block_size])))
            if block is None:
                break
            blocks.append(block)
            prefix = self._prefix_of[block]
        return blocks, prefix

    def hold(self, blocks: Sequence[int]) -> None:
        """Count one more holder of each block."""
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._free[block]
            self._num_holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, with one holder each. What they held is forgotten.

        Raises NoFreeBlocks, and then changes nothing.
        """
        if count > len(self._free):
            raise NoFreeBlocks(f"{count} blocks were asked for and {len(self._free)} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._num_holders[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Count one holder less of each block.

        Of a sequence's blocks the last is freed first, and so used first, as it is of no use without those before it.
        """
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            assert self._num_holders[block] >= 0, f"block {block} was released more often than held"
            if self._num_holders[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)

    def remember(self, block: int, token_ids: Sequence[int], prefix: int) -> int:
        """Remember that a full block holds `token_ids` after `prefix`. Returns the prefix that ends with it.

        If another block is remembered for the same tokens and prefix, this one is not, and that one's prefix is
        returned: what follows is then shared.
        """
        assert block not in self._key_of, f"block {block} is remembered already"
        key = (prefix, tuple(token_ids))
        known = self._block_of.setdefault(key, block)
        if known == block:
            self._last_prefix += 1
            self._key_of[block], self._prefix_of[block] = key, self._last_prefix
        return self._prefix_of[known]

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key], self._prefix_of[block]
