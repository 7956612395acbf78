"""Batches of labelled pairs from data larger than memory, in an order that can be resumed.

Images are read by window: a window is some whole parquet row groups (PairStream holds one and reads the next ahead),
its rows are permuted and each of its row groups is read once. An epoch's order is a pure function of (seed, epoch), so
the position in the data is one integer, and a resumed stream yields exactly the batches that the interrupted one would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from spo_fast.config.errors import RunError
from spo_fast.data.pair_rows import BadRowError, BadRows, PairRow, PairSource
from spo_fast.method import noise

WINDOW_ROWS = 8192
WINDOW_BYTES = 512 << 20  # of images: Pick-a-Pic's 8192 rows would be 3 GB

T = TypeVar("T")

# ---- order -----------------------------------------------------------------------------------------------------------


def split_by_prompt(source: PairSource, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and validation rows; share: the expected share of prompts that validate, in [0, 1).

    A prompt's side is a function of (seed, prompt) alone, whatever else the data holds. Unlabelled rows of a validation
    prompt are on neither side.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share} of the prompts cannot validate. Use --validation_share from 0 to below 1.")
    key = mixed(np.array([seed % 2**64], np.uint64))
    validates = (mixed(source.prompt_hash ^ key) >> np.uint64(11)) * 2.0**-53 < share
    train, validation = np.flatnonzero(~validates), np.flatnonzero(validates & source.labelled)
    if not len(train) or (share > 0 and not len(validation)):
        raise ValueError(
            f"{len(train)} training and {len(validation)} validation rows of {len(source)}: share={share} leaves one "
            "side empty. Change --validation_share or --seed, or add prompts (share 0 goes without validation)."
        )
    return train, validation


def mixed(x: np.ndarray) -> np.ndarray:
    """The bits of uint64, stirred: splitmix64's output function (Steele, Lea, Flood 2014) of x + its increment."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def windows_of(
    source: PairSource, indices: np.ndarray, window_rows: int, key: tuple[int, int] | None
) -> tuple[np.ndarray, list[int]]:
    """An epoch's order of the rows, and where in it each window ends. key: (seed, epoch); None keeps the given order.

    A window takes whole blocks while they fit into window_rows and WINDOW_BYTES, and at least one.
    """
    indices = np.asarray(indices, np.int64)
    if key is not None:
        indices = indices[np.lexsort((indices, source.blocks[indices]))]
    blocks = source.blocks[indices]
    starts = np.flatnonzero(np.diff(blocks, prepend=-1))
    lengths, numbers = np.diff(starts, append=len(indices)), blocks[starts]
    if key is not None:
        order = noise.permutation(len(starts), *key, noise.PAIRS).numpy()
        indices = indices[np.argsort(np.repeat(np.argsort(order), lengths), kind="stable")]
        lengths, numbers = lengths[order], numbers[order]
    ends: list[int] = []
    rows = size = end = 0
    for length, nbytes in zip(lengths.tolist(), source.block_bytes[numbers].tolist(), strict=True):
        if rows and (rows + length > window_rows or size + nbytes > WINDOW_BYTES):
            ends.append(end)
            rows = size = 0
        rows, size, end = rows + length, size + nbytes, end + length
    ends.append(end)
    if key is not None:
        window = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        indices = indices[np.lexsort((noise.permutation(len(indices), *key, noise.PAIRS + 1).numpy(), window))]
    return indices, ends


def shuffled(
    source: PairSource, indices: np.ndarray, seed: int, epoch: int, window_rows: int = WINDOW_ROWS
) -> np.ndarray:
    """The epoch's order: row groups permuted, then rows within windows of whole row groups."""
    return windows_of(source, indices, window_rows, (seed, epoch))[0]


# ---- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairBatch(Generic[T]):
    """B pairs, and what was loaded of each."""

    prompts: list[str]
    labels: Tensor  # (B,) float32, of image 0
    weights: Tensor  # (B,) float32
    loaded: list[T]
    position: int  # rows consumed since the start, over all epochs, bad ones included


class PairStream(Iterator[PairBatch[T]]):
    """Batches of pairs, for ever or for `epochs`; a new stream given a batch's `position` yields what follows it.

    load: runs in `workers` threads, at most `prefetch` batches ahead. Rows for which it raises BadRowError are added to
    `bad` and skipped; its other exceptions reach the consumer, and end the stream. Batches are full whatever was
    skipped, across epochs too; only the last of finite epochs may be short.
    Raises ValueError when too many rows are bad, or an epoch has no usable one.
    """

    def __init__(
        self,
        source: PairSource,
        indices: np.ndarray,
        batch_size: int,
        load: Callable[[PairRow], T],
        bad: BadRows,
        *,
        seed: int,
        position: int = 0,
        epochs: int | None = None,
        shuffle: bool = True,
        workers: int = 4,
        prefetch: int = 4,
    ) -> None:
        if min(len(indices), batch_size, workers, prefetch) < 1 or position < 0:
            raise ValueError(
                f"{len(indices)} rows, batch_size={batch_size}, workers={workers} and prefetch={prefetch} must be at "
                f"least 1, position={position} at least 0."
            )
        self.source, self.indices, self.batch_size = source, np.asarray(indices, np.int64), batch_size
        self.load, self.bad, self.seed, self.shuffle = load, bad, seed, shuffle
        self.position, self.epochs, self.ahead = position, epochs, prefetch * batch_size
        self._pool, self._reader = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)
        self._batches, self._closed = self._make_batches(), False

    def __next__(self) -> PairBatch[T]:
        if self._closed:
            raise StopIteration
        return next(self._batches)

    def __enter__(self) -> PairStream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads; what they had under way is lost."""
        self._closed = True
        for pool in (self._pool, self._reader):
            pool.shutdown(cancel_futures=True)

    def _make_batches(self) -> Iterator[PairBatch[T]]:
        pending: deque[tuple[int, PairRow, Future[T]]] = deque()
        batch: list[tuple[PairRow, T]] = []
        rows = self._rows()
        seen = rejected = usable = end = 0
        whole_epoch = self.position % len(self.indices) == 0  # one entered midway may well end in bad rows
        try:
            while True:
                for position, row in islice(rows, self.ahead - len(pending)):
                    pending.append((position, row, self._pool.submit(self.load, row)))
                if not pending:
                    break
                end, row, future = pending.popleft()
                seen += 1
                try:
                    batch.append((row, future.result()))
                    usable += 1
                except BadRowError as error:
                    self.bad.add(row.where, str(error))
                    rejected += 1
                # of this stream's own rows: known ones are met again, so a restart does not get past the limit
                self.bad.check(seen, rejected)
                if end % len(self.indices) == 0:
                    if whole_epoch and not usable:
                        raise RunError(
                            f"none of an epoch's {len(self.indices)} rows is usable ({self.bad.examples()}). "
                            f"{self.bad.path} names them all. Mend the data."
                        )
                    usable, whole_epoch = 0, True
                if len(batch) == self.batch_size:
                    yield make_batch(batch, end)
                    batch = []
            if batch:
                yield make_batch(batch, end)
        finally:
            self.close()

    def _rows(self) -> Iterator[tuple[int, PairRow]]:
        """(position after it, row), while the next window is being read."""
        windows = self._windows()
        coming = self._reader.submit(next, windows, None)
        while (window := coming.result()) is not None:
            coming = self._reader.submit(next, windows, None)
            position, rows = window
            rows.reverse()
            while rows:  # popped, so that images leave memory as they are used
                position += 1
                yield position, rows.pop()

    def _windows(self) -> Iterator[tuple[int, list[PairRow]]]:
        """(position before it, the rows of a window)."""
        epoch, offset = divmod(self.position, len(self.indices))
        while self.epochs is None or epoch < self.epochs:
            order, ends = windows_of(
                self.source, self.indices, WINDOW_ROWS, (self.seed, epoch) if self.shuffle else None
            )
            for end in ends:
                if end > offset:
                    yield epoch * len(order) + offset, self.source.read(order[offset:end])
                    offset = end
            epoch, offset = epoch + 1, 0


def make_batch(rows: list[tuple[PairRow, T]], position: int) -> PairBatch[T]:
    """Rows and what was loaded of each, as one batch."""
    labels = torch.tensor([row.label for row, _ in rows], dtype=torch.float32)
    weights = torch.tensor([row.weight for row, _ in rows], dtype=torch.float32)
    return PairBatch([row.prompt for row, _ in rows], labels, weights, [loaded for _, loaded in rows], position)
