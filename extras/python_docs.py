"""
The built-in corpus, `--dataset python-docs`: English prose from Python's help topics and from docstrings.

It comes with Python and with packages of requirements.txt, so it needs no network. Tables, code, lists of parameters
and headings are left out, since a small model would spend its training on them; so are paragraphs seen before.
"""

import ast
import importlib.util
import itertools
import json
import platform
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from extras.files import atomic_file
from extras.manifest import SourceRecord
from extras.sources import Source, SourceFile, scratch_name

PYTHON_DOCS = "python-docs"
VERSION = 2  # of the rules below; a set made by other rules is another set
PACKAGES = ("matplotlib", "networkx", "numpy", "pandas")  # much prose, and parsed in seconds
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "pydoc_data"}
LIST_MARK = re.compile(r"^ *([-*+•]|\(?\d{1,2}[.)]) +(?=\S)")
ROLE = re.compile(r":[\w:+-]+:`~?([^`<]+?)\s*(?:<[^`]*>)?`")  # :class:`~a.B` is a.B, :ref:`text <label>` is text
PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "–": "-", "—": "-", "`": None})
COMMON = re.compile(
    r"\b(a|all|an|and|any|are|as|at|be|but|by|can|for|from|has|have|if|in|into|is|it|its|may|must|no|not|of|on|only|or|"
    r"should|such|than|that|the|then|this|to|used|was|when|which|will|with)\b",
    re.IGNORECASE,
)


def docs_source() -> Source:
    """One JSON lines file. Its text depends on what the revision names, and on nothing else."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    documents = [[topics[name]] for name in sorted(topics)]
    documents += module_docs(Path(sysconfig.get_path("stdlib")))
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            version, folders = metadata.version(name), importlib.util.find_spec(name).submodule_search_locations
        except (metadata.PackageNotFoundError, AttributeError):  # not installed
            continue
        versions.append(f"{name} {version}")
        documents += module_docs(Path(folders[0]))
    texts = prose(documents)
    random.Random(0).shuffle(texts)  # validation is on the first of them
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()

    def make(target):
        with atomic_file(target) as file:
            file.write(data)

    name, revision = f"{PYTHON_DOCS}.jsonl", f"{', '.join(versions)}, corpus version {VERSION}"
    record = SourceRecord(dataset=PYTHON_DOCS, revision=revision, files=[(name, len(data))])
    return Source(record, [SourceFile(name, len(data), scratch_name(name, revision, len(data)), make)])


def module_docs(library: Path) -> Iterator[list[str]]:
    """The docstrings of each class in `library`, and of what else is in each module, if there are any; by path.

    The files are parsed, never imported: importing a standard library module can open a browser.
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        parts = path.relative_to(library).parts
        if SKIPPED & set(parts) or parts[0].startswith("config-"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # templates and test data
            continue
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        tree.body = [node for node in tree.body if node not in classes]
        for part in (tree, *classes):
            docs = (ast.get_docstring(node) for node in ast.walk(part) if isinstance(node, documented))
            if docs := list(filter(None, docs)):
                yield docs


def prose(documents: list[list[str]]) -> list[str]:
    """Documents of several texts -> documents of their prose, a paragraph a line; those without any are left out."""
    seen, found = set(), []
    for texts in documents:
        kept = dict.fromkeys(paragraph for text in texts for paragraph in paragraphs(text) if is_prose(paragraph))
        kept = [paragraph for paragraph in kept if paragraph not in seen]
        seen.update(kept)
        if kept:
            found.append("\n\n".join(kept))
    return found


def paragraphs(text: str) -> Iterator[str]:
    """Neighbouring lines of one indentation, without markup, on one line; list items become paragraphs."""

    def indentation(line: str) -> int | None:
        is_table_or_empty = not re.search(r"\w", line) or re.search(r"\S {3,}\S", line)
        return None if is_table_or_empty else len(line) - len(line.lstrip())

    lines = [LIST_MARK.sub(lambda mark: " " * len(mark[0]), line) for line in text.expandtabs().splitlines()]
    for indented, block in itertools.groupby(lines, indentation):
        if indented is not None:
            yield ROLE.sub(r"\1", " ".join(" ".join(block).split())).translate(PLAIN)


def is_prose(paragraph: str) -> bool:
    """Whether it looks like English sentences: mostly letters, and a quarter of its words are the commonest ones."""
    words = re.findall(r"[A-Za-z][A-Za-z']*", paragraph)
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    is_sentence = paragraph[:1].isupper() and paragraph[-1:] in (".", "!", "?")
    is_english = len(words) >= 6 and len(COMMON.findall(paragraph)) >= 0.25 * len(words)
    return is_sentence and is_english and letters >= 0.9 * len(paragraph)
