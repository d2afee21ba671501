"""A continuous-batching text generator, as the worked example of how to build on quire.

SPDX-License-Identifier: Apache-2.0

Read the files in this order: config.py (a checkpoint's config.json), checkpoint.py (its weights), backend.py
(the array library), cache.py (the paged KV cache), model.py (the forward pass), sampling.py, engine.py (the
scheduler), cli.py. Arrays are NumPy's on the CPU and CuPy's on a GPU; PyTorch is never imported, except by
train.py.
"""

from __future__ import annotations


class DemoError(Exception):
    """A user's mistake or a limit of the machine, told in one line.

    The command line prints it and exits with code 2.
    """
