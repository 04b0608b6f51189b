"""The built-in corpus: prose, no paragraph twice, and a revision that names all it depends on."""

import json
import platform
import re
import shutil
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
        The lists to take the items from. See :class:`~a.List` and :ref:`the notes <notes>`.
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
    "The lists to take the items from. See a.List and the notes.",
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
        ["The module.", "Return it, in\ntwo lines.", "Wait for it."],
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "out"
    fineweb.main(fineweb.Config(dataset="python-docs", out=str(out), workers=0))
    return out


def test_python_docs(corpus):
    """No network; and any stretch of it is like any other."""
    manifest = json.loads((corpus / "manifest.json").read_text())
    tokens = np.concatenate([np.load(corpus / shard["name"]) for shard in manifest["shards"]])
    versions = [f"{name} {metadata.version(name)}" for name in python_docs.PACKAGES]
    revision = ", ".join([f"Python {platform.python_version()}", *versions, f"corpus version {python_docs.VERSION}"])
    assert manifest["source"]["revision"] == revision
    assert 600_000 < len(tokens) < 1_500_000
    assert 0.02 < manifest["shards"][0]["tokens"] / len(tokens) < 0.08
    texts = load_tokenizer("gpt2").decode(tokens).split("<|endoftext|>")[1:]
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    assert len(texts) > 1000 and len(paragraphs) == len(set(paragraphs))
    assert not [p for p in paragraphs if re.search(r"\s{2}|\n|>>>|----|====", p)]
    of_arrays = [len(re.findall(r"\b(?:array|DataFrame|graph|axes)\b", text, re.IGNORECASE)) > 0 for text in texts]
    assert 0.5 < sum(of_arrays[:300]) / sum(of_arrays[-300:]) < 2  # the packages are mixed


def test_a_set_of_another_version_is_refused(corpus, tmp_path, monkeypatch):
    out = shutil.copytree(corpus, tmp_path / "out")
    config = fineweb.Config(dataset="python-docs", out=str(out), workers=0)
    fineweb.main(config)  # the same again: nothing to do
    monkeypatch.setattr(python_docs, "VERSION", python_docs.VERSION + 1)
    with pytest.raises(UserError, match=r"begun with .*version 2, and this is .*version 3; choose another --out"):
        fineweb.main(config)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["source"]["revision"] = f"Python {platform.python_version()}"  # as before there were versions
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"begun with Python [\d.]+, and this is Python .*; choose another --out"):
        fineweb.main(config)
    for path in corpus.glob("*.npy"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_without_the_packages_it_is_python_alone(monkeypatch):
    monkeypatch.setattr(python_docs, "PACKAGES", ("a_package_that_nobody_has",))
    record = python_docs.docs_source().record
    assert record.revision == f"Python {platform.python_version()}, corpus version {python_docs.VERSION}"
    assert 500_000 < record.files[0][1] < 3_000_000
