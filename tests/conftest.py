"""Options and fixtures that all tests share."""

import math
import os
import pathlib
import time
import zlib

import jax
import numpy as np
import pytest
from hypothesis import settings

collect_ignore = ["support"]
pytest.register_assert_rewrite("tests.support")

if not pathlib.Path("/dev/nvidiactl").exists():
    # So that jax's CUDA plugin, where it is installed, compiles for GPUs that are not here.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

NOT_REACHED = "not reached in the time of this run"

settings.register_profile("q4jax", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("q4jax")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=50, help="how often test_kill.py kills a save")
    parser.addoption(
        "--kernel-calls", type=int, default=160, help="of the contract's matrix of over 1000 cases"
    )
    parser.addoption(
        "--executed",
        type=int,
        default=120,
        help="how many cases of that matrix run as PTX for sm_80; two thirds as many for sm_90, a "
        "sixth for sm_89, sm_100 and sm_120",
    )
    parser.addoption(
        "--mutants", type=int, default=20, help="altered instructions of each executed kernel"
    )
    parser.addoption(
        "--simulated",
        type=int,
        default=70,
        help="cases of the TPU kernels' matrix in the heavy tier",
    )
    parser.addoption("--problems", type=int, default=2000, help="random ones for implementations")
    parser.addoption("--seed", type=int, help="of the random problems; the header names a run's")
    parser.addoption(
        "--share", type=int, default=1, help="run one test of so many, others with each --seed"
    )
    parser.addoption(
        "--until",
        type=float,
        default=math.inf,
        help="start no test after this time, in seconds since the epoch; --seed orders the files",
    )


def pytest_configure(config):
    if config.option.seed is None:
        config.option.seed = getattr(config, "workerinput", {}).get("seed")
    if config.option.seed is None:
        config.option.seed = int.from_bytes(os.urandom(4))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_configure_node(node):
    """Give each worker the seed that the header names, since workers share arguments only."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_collection_modifyitems(config, items):
    """Keep a share of the tests, and shuffle their files: in all workers alike."""
    seed, share = config.option.seed, config.option.share
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        part = zlib.crc32(f"{seed} {item.nodeid}".encode()) % share
        (others if part else kept).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = kept
    if config.option.until < math.inf:  # so that each run reaches other files
        items.sort(key=lambda item: zlib.crc32(f"{seed} {item.path.name}".encode()))


def pytest_runtest_setup(item):
    if time.time() > item.config.option.until:
        pytest.skip(NOT_REACHED)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.getreports("skipped")
    count = sum(NOT_REACHED in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"{count} tests: {NOT_REACHED}")


def pytest_report_header(config):
    return f"random problems: --seed {config.option.seed}"


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs would add up to several GB over the whole suite."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def few_optimizations():
    from tests.support.optimizations import optimizations  # after register_assert_rewrite

    with optimizations(few=True):
        yield


@pytest.fixture
def sampling(request):
    """Return the options with which a test in a process of its own has this run's sample."""
    option = request.config.option
    return ["--seed", str(option.seed), "--until", str(option.until)]


@pytest.fixture
def rng():
    return np.random.default_rng(20261121)
