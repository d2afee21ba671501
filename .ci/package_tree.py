"""One folder with the whole package, for tools that read it without importing it (mypy, the docs).

SPDX-License-Identifier: Apache-2.0

In an editable install the stub of the extension, which the build makes, lies apart from the Python files.
"""

import importlib.util
import shutil
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "python" / "quire"


def find_stub() -> Path:
    """The stub beside the extension that `import quire` would load; FileNotFoundError if there is none."""
    try:
        spec = importlib.util.find_spec("quire._core")
    except ImportError:
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).with_name("_core.pyi").exists():
        raise FileNotFoundError(
            "the stub of quire._core was not found; install quire first, with this Python"
        )
    return Path(spec.origin).with_name("_core.pyi")


def copy_tree(folder: Path) -> Path:
    """Makes `folder`/quire with copies of the Python files and the stub; returns `folder`."""
    stub = find_stub()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        SOURCE, folder / "quire", ignore=shutil.ignore_patterns("__pycache__", "_core*", "*.safetensors")
    )
    shutil.copy(stub, folder / "quire")
    return folder
