"""The documentation's code: every Python block of the guides, the docstrings' examples, and the API pages' completeness.

SPDX-License-Identifier: Apache-2.0

The blocks below one second-level heading share a namespace. A ```text block right after a ```python block is what it prints.
"""

import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import re
import sys
import types
from pathlib import Path

import frameworks
import numpy as np
import pytest

import quire

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "docs/quickstart.md",
    "docs/concepts/block_allocator.md",
    "docs/concepts/index.md",
    "docs/concepts/kv_transfer.md",
    "docs/building.md",
    "docs/debugging.md",
    "docs/quantization.md",
    "docs/c.md",
    "docs/frameworks/cupy.md",
    "docs/frameworks/jax.md",
    "docs/frameworks/numpy.md",
    "docs/frameworks/pytorch.md",
]
FRAMEWORKS = ["torch", "cupy", "jax", "ml_dtypes", "transformers"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections(page):
    """(heading, [(code, what it prints or None), ...]) of a page's sections that have Python code."""
    path = ROOT / page
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = []
    # A heading-like line inside a fence is a comment of a shell or Python block: hide fences while splitting.
    for part in re.split(
        r"^## (?=.*$)", FENCE.sub(lambda m: m[0].replace("\n#", "\n\0#"), text), flags=re.MULTILINE
    ):
        heading = part.partition("\n")[0].strip("# ")
        fences = [(m[1], m[2].replace("\0", ""), m.start(), m.end()) for m in FENCE.finditer(part)]
        blocks = []
        for i, (language, code, _, end) in enumerate(fences):
            if language != "python":
                continue
            follows = (
                i + 1 < len(fences)
                and fences[i + 1][0] == "text"
                and not part[end : fences[i + 1][2]].strip()
            )
            blocks.append((code, fences[i + 1][1] if follows else None))
        if blocks:
            found.append((heading, blocks))
    return found


def cases():
    for page in PAGES:
        for heading, blocks in sections(page):
            # README puts all frameworks in one section; each framework's blocks are a case of their own there.
            groups: dict[str, list] = {}
            name = ""
            for code, expected in blocks:
                imported = [
                    f
                    for f in FRAMEWORKS
                    if re.search(rf"^\s*import {f}\b", code, re.MULTILINE) and f != "ml_dtypes"
                ]
                name = imported[0] if imported else name
                groups.setdefault(name, []).append((code, expected))
            for framework, group in groups.items():
                yield pytest.param(group, id=f"{page}-{heading}" + (f"-{framework}" if framework else ""))


def skip_what_is_absent(code):
    for name in FRAMEWORKS:
        if re.search(
            rf"^\s*(?:import|from) (?:quire\.)?{name}\b", code, re.MULTILINE
        ) and not frameworks.has_module(name):
            pytest.skip(f"{name} is not installed")
    if "import cupy" in code and not frameworks.has_gpu():
        pytest.skip("cupy: no CUDA device, or a CPU-only build")


@pytest.fixture
def namespace(monkeypatch):
    """Of a module that can be found by its name, as compilers of functions do; no file on the path has such a name."""
    module = types.ModuleType("quire documentation")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return vars(module)


@pytest.mark.parametrize("blocks", list(cases()))
def test_blocks_run(blocks, namespace):
    for code, expected in blocks:
        skip_what_is_absent(code)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "<documentation>", "exec"), namespace)
        if expected is not None:
            assert printed.getvalue().strip() == expected.strip()


def test_every_page_is_found():
    if not (ROOT / "docs").exists():
        pytest.skip("the source tree is not there")
    with_code = ["README.md", "CONTRIBUTING.md", "SECURITY.md"]
    with_code += [str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(page for page in with_code if sections(page)) == sorted(PAGES)


NAMES = [f"quire.{name}" for name in quire.__all__ if not name.startswith("__")]


def names_of(module):
    """The public names of a module whose framework is here."""
    if not frameworks.has_module(module.rpartition(".")[2]):
        return []
    return [f"{module}.{name}" for name in importlib.import_module(module).__all__]


def members_of(item):
    """(name, function) of what a class of ours offers, itself not among them."""
    if not inspect.isclass(item):
        return []
    public = {name: value for name, value in vars(item).items() if not name.startswith("_")}
    unwrapped = {
        name: getattr(value, "__func__", getattr(value, "fget", value)) for name, value in public.items()
    }
    return [(name, value) for name, value in unwrapped.items() if callable(value)]


@pytest.mark.parametrize("name", NAMES + names_of("quire.jax"))
def test_docstring_examples(name):
    module, _, attribute = name.rpartition(".")
    item = getattr(importlib.import_module(module), attribute)
    for where, member in [("", item), *members_of(item)]:
        assert member.__doc__, f"{name}.{where} has no docstring"
        examples = doctest.DocTestParser().get_doctest(member.__doc__, {}, f"{name}.{where}", None, 0)
        printed = io.StringIO()
        with np.printoptions(legacy=False):
            doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(examples, out=printed.write)
        assert printed.getvalue() == ""


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_are_complete(name):
    """Each argument, in order, and what is raised; or the function that both are as in."""
    item = getattr(quire, name.rpartition(".")[2])
    functions = [(name, item)] if inspect.isfunction(item) or item is quire.KVCache else []
    functions += [
        (f"{name}.{where}", member) for where, member in members_of(item) if inspect.isfunction(member)
    ]
    for where, function in functions:
        arguments = [
            argument for argument in inspect.signature(function).parameters if argument not in ("self", "cls")
        ]
        text = inspect.getdoc(function)
        if not arguments or re.search(r"[Ee]xceptions are those of|so are the exceptions", text):
            continue
        described = re.search(r"^Args:\n((?:    .*\n|\n)+)", text, re.MULTILINE)
        if described is not None or len(arguments) > 1:
            assert described, f"{where} says nothing of {arguments}"
            assert re.findall(r"^    (\w+):", described[1], re.MULTILINE) == arguments, where
        assert "\nRaises:\n" in text, where


def test_the_message_of_the_guides():
    """The one that README and guides show is what such a call says."""
    tables = np.zeros((4, 12), np.int64)
    q, cache = np.ones((4, 2, 8), np.float32), np.ones((12, 4, 1, 8), np.float32)
    with pytest.raises(TypeError) as caught:
        quire.paged_attention(q, cache, cache, tables, np.ones(4, np.int32))
    for page in ("README.md", "docs/concepts/index.md", "docs/debugging.md"):
        if (ROOT / page).exists():
            assert str(caught.value) in (ROOT / page).read_text(encoding="utf-8")
    assert str(caught.value) == "[paged_attention] block_tables: expected int32 [4, *], got int64 [4, 12]"


def test_support_matrix():
    """The CPU table of the page is what running it gives, for the frameworks that are here."""
    page = ROOT / "docs" / "frameworks" / "index.md"
    if not page.exists():
        pytest.skip("the source tree is not there")
    spec = importlib.util.spec_from_file_location(
        "support_matrix", ROOT / "docs" / "_build" / "support_matrix.py"
    )
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    made = [
        line for line in matrix.table("CPU").splitlines() if line.startswith("| ") and "not run" not in line
    ]
    shown = page.read_text(encoding="utf-8").splitlines()
    assert len(made) > 1
    assert [line for line in made if line not in shown] == []
    assert "wrong" not in "".join(made)


def test_api_pages_are_complete():
    if not (ROOT / "docs").exists():
        pytest.skip("the source tree is not there")
    documented = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"^::: (\S+)", text, re.MULTILINE):
            documented.add(target.rpartition(".")[2])
            with contextlib.suppress(ModuleNotFoundError):
                documented |= set(getattr(importlib.import_module(target), "__all__", ()))
        for members in re.findall(r"members: \[(.*)\]", text):
            documented |= {member.strip() for member in members.split(",")}
    assert {name for name in quire.__all__ if not name.startswith("__")} - documented == set()


@pytest.mark.parametrize(("page", "module"), [("index.md", "quire"), ("torch.md", "quire.torch")])
def test_api_pages_list_what_there_is(page, module):
    """Those that are lists by hand; of `index.md` the table."""
    path = ROOT / "docs" / "api" / page
    if not path.exists():
        pytest.skip("the source tree is not there")
    if not frameworks.has_module(module.rpartition(".")[2]):
        pytest.skip(f"{module} has no framework here")
    there = set(importlib.import_module(module).__all__)
    table = [
        line
        for line in path.read_text(encoding="utf-8").splitlines()
        if page == "torch.md" or line.startswith("|")
    ]
    listed = set(re.findall(r"`(\w+)`", "\n".join(table)))
    assert listed == there
