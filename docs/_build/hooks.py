"""mkdocs hooks: the package with its stub for the API pages, and the notes of docs/design and docs/concepts in the navigation.

SPDX-License-Identifier: Apache-2.0
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / ".ci"))

from mkdocs.plugins import event_priority  # noqa: E402
from package_tree import copy_tree  # noqa: E402


@event_priority(100)  # before mkdocstrings looks for the folder
def on_config(config):
    """Copies the package and completes the navigation with the pages that these folders hold."""
    copy_tree(ROOT / "build" / "docs")
    docs = Path(config.docs_dir)
    for section in config.nav:
        for pages in section.values():
            index = pages[0] if isinstance(pages, list) else ""
            if index in ("design/index.md", "concepts/index.md"):
                pages += sorted(
                    str(path.relative_to(docs))
                    for path in (docs / index).parent.glob("*.md")
                    if path.name != "index.md"
                )
    return config
