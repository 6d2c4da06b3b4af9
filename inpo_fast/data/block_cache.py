"""Blocks of a source (row groups) in memory: each is read once however many threads ask, and the total is bounded."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class BlockCache(Generic[T]):
    """load(number) gives a block, size(block) how much it counts, expected(number) a guess of that before it is read.

    size, expected and limit have one unit, bytes or blocks. The blocks unused for longest go when there is more than
    `limit`; a block that is in use stays alive with its user. Room is made before a block is read, so the limit holds
    while it is read too, as far as the guess does.
    """

    def __init__(self, load: Callable[[int], T], size: Callable[[T], int], expected: Callable[[int], int], limit: int):
        self.load, self.size, self.expected, self.limit = load, size, expected, limit
        self.lock = threading.Lock()
        self.blocks: OrderedDict[int, Future[T]] = OrderedDict()
        self.sizes: dict[int, int] = {}
        self.loads = 0

    def get(self, number: int) -> T:
        with self.lock:
            block = self.blocks.get(number)
            mine = block is None
            if mine:
                block = self.blocks[number] = Future()
                self.loads += 1
                self._book(number, self.expected(number))
            else:
                self.blocks.move_to_end(number)
        if mine:
            try:
                value = self.load(number)
            except BaseException as problem:
                with self.lock:
                    del self.blocks[number], self.sizes[number]
                block.set_exception(problem)
                raise
            block.set_result(value)
            with self.lock:
                self._book(number, self.size(value))
        return block.result()

    def _book(self, number: int, size: int) -> None:
        """Notes a block's size and lets old ones go; those still being read cannot."""
        self.sizes[number] = size
        total = sum(self.sizes.values())
        for old in list(self.blocks):
            if total <= self.limit:
                break
            if old != number and self.blocks[old].done():
                total -= self.sizes.pop(old)
                del self.blocks[old]
