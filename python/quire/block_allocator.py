"""The block allocator: who owns which block of the paged KV cache, and a batch's index arrays.

SPDX-License-Identifier: Apache-2.0

The class is the extension's own, without a wrapper: an engine calls it several times in every step.
"""

from quire._core import (
    BlockAllocator,
    BlockAllocatorStats,
    BlockEvent,
    OutOfBlocksError,
    SequenceInfo,
)

__all__ = ["BlockAllocator", "BlockAllocatorStats", "BlockEvent", "OutOfBlocksError", "SequenceInfo"]
