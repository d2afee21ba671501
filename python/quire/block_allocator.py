"""The block allocator: who owns which block of the paged KV cache, what can be reused, and a batch's index arrays.

SPDX-License-Identifier: Apache-2.0

The class is the extension's own, without a wrapper: a decode step calls it a few times, and each call costs what the work costs.
"""

from quire._core import (
    BlockAllocator,
    BlockAllocatorStats,
    BlockEvent,
    OutOfBlocksError,
    SequenceInfo,
)

__all__ = ["BlockAllocator", "BlockAllocatorStats", "BlockEvent", "OutOfBlocksError", "SequenceInfo"]
