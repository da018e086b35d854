"""The examples in the docstrings of public classes.

Their `__module__` is "q4jax", so that pickles and reprs do not depend on the layout; pytest's
doctests leave such classes out.
"""

import doctest

import pytest

import q4jax

CLASSES = [value for name in q4jax.__all__ if isinstance(value := getattr(q4jax, name), type)]
FINDER, FLAGS = doctest.DocTestFinder(exclude_empty=True), doctest.NORMALIZE_WHITESPACE


def test_public_classes_are_named_by_the_package():
    assert {cls.__module__ for cls in CLASSES} == {"q4jax"}
    assert len(CLASSES) >= 15


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_examples(cls):
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in FINDER.find(cls, cls.__name__, module=False, globs={}):
        runner.run(test)
    assert not runner.summarize(verbose=False).failed


def test_there_are_examples():
    found = [t for cls in CLASSES for t in FINDER.find(cls, cls.__name__, module=False)]
    assert sum(bool(test.examples) for test in found) >= 12
