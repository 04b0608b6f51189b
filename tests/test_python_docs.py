"""The built-in corpus: prose, no paragraph twice, and a revision that names all it depends on."""

import json
import platform
import re
from importlib import metadata

import numpy as np
import pytest

import fineweb
from extras import python_docs
from extras.cli import UserError
from extras.tokenizer import load_tokenizer

FUNCTION = '''
    """Return the items of a list in the order
    in which they were given.

    Parameters
    ----------
    first, second : list of str
        The lists to take the items from. See :class:`~a.List`, :ref:`the notes <notes>` and ``:a:``.
    size : int

        ======  =======================
        Name    The value of it is this.
        ======  =======================

    * The first of them is in the ``list`` “a”,
      and so is this.
    2. The second of them is in the list.

    >>> f(1)
    It is the first of all the items.
    For example, this is the way to do it::

        for item in the_list: it = item.

    Return the items of a list in the order in which they were given.
    """
'''
PROSE = [
    "Return the items of a list in the order in which they were given.",
    "The lists to take the items from. See a.List, the notes and :a:.",
    'The first of them is in the list "a", and so is this.',
    "The second of them is in the list.",
]


def test_docstrings_are_found_without_importing(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "tests/test_it.py").write_text('"""A test package, which is of no interest to anyone at all."""')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "silent.py").write_text("def f():\n    return 1")
    (tmp_path / "package/__init__.py").write_text(
        '"""The module."""\nraise SystemExit\nclass A:\n'
        '    def f(self):\n        """Return it, in\n        two lines."""\n'
        "    async def g(self):\n        'Wait for it.'\n"
    )
    (tmp_path / "b.py").write_text("def f():\n    'First of all, by its path.'")
    (tmp_path / "package/a.py").write_text("'''Another module.'''")
    assert list(python_docs.module_docs(tmp_path)) == [
        ["First of all, by its path."],
        ["The module."],
        ["Return it, in\ntwo lines.", "Wait for it."],
        ["Another module."],
    ]


def test_only_prose_is_kept_and_only_once(tmp_path):
    (tmp_path / "module.py").write_text(f"def f():{FUNCTION}def g():{FUNCTION}", encoding="utf-8")
    (docs,) = python_docs.module_docs(tmp_path)
    assert python_docs.prose([docs]) == ["\n\n".join(PROSE)]
    assert python_docs.prose([docs[:1], docs[1:], ["Nothing."], ["Now this is one of the others."]]) == [
        "\n\n".join(PROSE),
        "Now this is one of the others.",
    ]


@pytest.mark.parametrize(
    "paragraph",
    [
        "It is too short.",
        "it begins in the middle of a sentence.",
        "It has no end that is marked by a stop",
        "This is followed by the code that it is about:",
        "Foo bar baz quux spam eggs ham bacon.",
        "The (a) [b] {c} <d> | of it / is = to + it ** (e) [f] {g} <h>.",
        "",
    ],
)
def test_what_is_no_prose(paragraph):
    assert not python_docs.is_prose(paragraph)
    assert python_docs.is_prose("It is one of the sentences that are to be kept.")


def revision(packages) -> str:
    versions = [f"{name} {metadata.version(name)}" for name in packages]
    return ", ".join([f"Python {platform.python_version()}", *versions, f"corpus version {python_docs.VERSION}"])


def test_python_docs(tmp_path):
    """No network; and any stretch of it is like any other."""
    fineweb.main(fineweb.Config(dataset="python-docs", out=str(tmp_path / "out"), workers=0))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["source"]["revision"] == revision(python_docs.PACKAGES)
    tokens = np.concatenate([np.load(tmp_path / "out" / shard["name"]) for shard in manifest["shards"]])
    assert 600_000 < len(tokens) < 1_500_000
    assert 0.02 < manifest["shards"][0]["tokens"] / len(tokens) < 0.08
    texts = load_tokenizer("gpt2").decode(tokens).split("<|endoftext|>")[1:]
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    assert len(texts) > 2000 and len(paragraphs) == len(set(paragraphs))
    assert not [paragraph for paragraph in paragraphs if re.search(r"\s{2}|\n|>>>|----|====", paragraph)]
    of_packages = [bool(re.search(r"\b(array|DataFrame|graph|axes)\b", text, re.IGNORECASE)) for text in texts]
    assert 0.5 < sum(of_packages[:500]) / sum(of_packages[-500:]) < 2  # mixed with Python's


@pytest.fixture
def short(monkeypatch):
    """A corpus of a few paragraphs; returns the folders that were searched."""
    folders = []

    def module_docs(folder):
        folders.append(folder.name)
        return [["It is one of the sentences that are to be kept."], ["This is another of the sentences."]]

    monkeypatch.setattr(python_docs, "module_docs", module_docs)
    return folders


def test_a_set_of_another_version_is_refused(short, tmp_path, monkeypatch, capsys):
    config = fineweb.Config(dataset="python-docs", out=str(tmp_path / "out"), workers=0)
    fineweb.main(config)
    fineweb.main(config)
    assert "is complete" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(python_docs, "VERSION", python_docs.VERSION + 1)
    with pytest.raises(UserError, match=r"begun with .*version 2, and this is .*version 3; choose another --out"):
        fineweb.main(config)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_package_that_is_not_installed_is_left_out_and_not_in_the_revision(short, monkeypatch):
    monkeypatch.setattr(python_docs, "PACKAGES", ("a_package_that_nobody_has", "numpy"))
    record = python_docs.docs_source().record
    assert record.revision == revision(["numpy"])
    assert len(short) == 2 and short[1] == "numpy"
