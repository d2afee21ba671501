"""Griffe extension: our docstrings as mkdocstrings reads them.

SPDX-License-Identifier: Apache-2.0
"""

import re

import griffe


def convert(text: str) -> str:
    """Names the example section as Griffe does, turns Sphinx roles into code, and drops the licence line."""
    text = re.sub(r"^([ \t]*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = re.sub(r":(?:func|class|meth):`~?([^`]+)`", r"`\1`", text)
    text = text.replace('"cuda:<index>"', '`"cuda:<index>"`')
    return text.replace("SPDX-License-Identifier: Apache-2.0", "").strip()


class Docstrings(griffe.Extension):
    """Converts every docstring of quire."""

    def on_object(self, *, obj, **_):
        """Once an object and its members are loaded."""
        if obj.docstring is not None:
            # The extension's says to use the package instead, and the pages show what the package exports of it.
            obj.docstring.value = "" if obj.path == "quire._core" else convert(obj.docstring.value)
