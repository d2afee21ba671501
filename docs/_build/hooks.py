"""mkdocs hook: the package with its stub, from which the API pages are made.

SPDX-License-Identifier: Apache-2.0
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / ".ci"))

from mkdocs.plugins import event_priority
from package_tree import copy_tree


@event_priority(100)  # before mkdocstrings looks for the folder
def on_config(config):
    """Copies the package."""
    copy_tree(ROOT / "build" / "docs")
    return config
