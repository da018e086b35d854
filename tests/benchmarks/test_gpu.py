"""`benchmarks/gpu.py` without a GPU: the flow, what it writes, and that its checks can fail."""

import json
import types

import jax
import pytest
from gpubench import bench, clock, device, goals, report, run, timings, tools, tune

from q4jax.gpu import tiles
from q4jax.pallas import matmul as linear

TILE = tiles.Tile(32, 32, 64, 4, 2)
ROW_KEYS = {
    "operation", "n", "k", "m", "us", "way", "floor_us", "floor_is", "fraction_of_floor",
    "share_of_copy_bandwidth", "against", "goals",
}  # fmt: skip


@pytest.fixture
def fresh():
    """What is traced within a test is neither taken from another nor left to one."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def dry(tmp_path):
    """A step of a dry run in a folder of its own; its exit code and what it wrote."""

    def step(name):
        code = run.main(["--step", name, "--dry-run", "--out", str(tmp_path), "--threads", "2"])
        return code, json.loads((tmp_path / f"{name}.json").read_text())

    yield step
    tiles.use_table(None)


@pytest.mark.heavy
@pytest.mark.usefixtures("fresh")
def test_dry_run(dry, tmp_path, capsys):
    """Each step in turn, what it writes, and what the next one takes from it."""
    before = tune.TABLE.read_bytes()
    code, results = dry("check")
    out = capsys.readouterr().out
    assert (code, out.count("figures mean nothing"), results["failures"]) == (0, 1, [])
    assert out.rstrip().endswith("**Nothing failed.**")
    assert results["about"]["versions"]["jax"] == jax.__version__
    check = results["checks"]["pallas_interpret"]
    assert (check["run"], check["failures"], check["refused"]) == (5, [], [])
    assert set(results["sanitizer"]) == {"memcheck", "racecheck"}
    assert "ended with 0" in results["sanitizer"]["memcheck"]["unavailable"]

    code, results = dry("tune")
    assert (code, results["failures"]) == (0, [])
    tried = [entry for entry in results["tuning"] if "tried" in entry]
    assert [(entry["row"], entry["tried"]) for entry in tried] == [
        ("linear 16 bits M <= 16", 2),
        ("linear_transpose 16 bits M <= 16", 2),
    ]
    ratios = {e["operation"]: e["kernel is faster by"] > 0 for e in results["tuning"] if "m" in e}
    assert ratios == {"linear": True, "linear_transpose": True}
    proposed = json.loads((tmp_path / "tiles.json").read_text())
    assert proposed.keys() == json.loads(before).keys()

    code, results = dry("measure")
    assert (code, results["failures"], results["dropped"]) == (0, [], [])
    assert results["tiles"] == "those that --step tune proposes"
    assert set(results["rates"]) == {"copy_bytes_per_second", "bf16_flop_per_second"}
    assert results["clock"]["kind"] == "wall"
    rows = {(row["operation"], row["m"]): row for row in results["rows"]}
    products = [(name, 1) for name in ("linear", "linear_transpose")]
    assert set(rows) == {*products, ("dequantize", 0), ("quantize", 0)}
    for row in rows.values():
        assert set(row) == ROW_KEYS
        assert min(row["us"].values()) > 0
        assert set(row["fraction_of_floor"]) == set(row["us"])
    times = {"dense", "dense by XLA", "dequantize + dot", "xla", "pallas_interpret"}
    assert set(rows["linear_transpose", 1]["us"]) == times
    [goal] = rows["linear", 1]["goals"]
    assert (goal["metric"], goal["floor"], goal["aim"]) == ("x dense", 2.2, 2.7)
    assert {line["regime"] for line in results["summary"]} >= {"dequantize", "linear, M = 1"}
    assert "mean nothing" in (tmp_path / "measure.md").read_text()

    assert tune.TABLE.read_bytes() == before
    files = {f"{step}.{kind}" for step in run.STEPS for kind in ("json", "md")}
    assert {p.name for p in tmp_path.iterdir()} - {"measure.png"} == {*files, "tiles.json"}


@pytest.mark.heavy
@pytest.mark.usefixtures("fresh")
def test_a_wrong_kernel_is_named_last_and_the_others_are_timed(dry, monkeypatch, capsys):
    right = linear.linear

    def wrong(*args, **kwargs):
        y = right(*args, **kwargs)
        return y.at[-1, -1].add(1)

    monkeypatch.setattr(linear, "linear", wrong)
    code, results = dry("check")
    failures = results["checks"]["pallas_interpret"]["failures"]
    assert code == 1
    assert {failure["operation"] for failure in failures} == {"linear"}
    assert len(failures) == len(results["failures"]) == 2
    assert "outside the bound" in failures[0]["reason"]
    last = capsys.readouterr().out.rstrip().splitlines()[-3:]
    assert last[0] == "**2 failed**"
    case = "pallas_interpret: linear nf4 bfloat16 b64 nested [24, 128] M=3"
    assert last[1].startswith(f"- FAILED {case}: ")
    code, results = dry("measure")
    times = {row["operation"]: set(row["us"]) for row in results["rows"]}
    assert "pallas_interpret" not in times["linear"]
    assert "pallas_interpret" in times["linear_transpose"]


def test_a_step_that_fails_is_named(dry, monkeypatch):
    """What it had found is written all the same."""

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(run, "set_clock", fail)
    code, results = dry("measure")
    assert (code, results["tiles"]) == (1, "the package's")
    [failure] = results["failures"]
    assert failure == {"case": "step measure", "reason": "RuntimeError: no memory"}


def test_outputs_of_the_tools():
    good = "========= ERROR SUMMARY: 0 errors\n"
    assert tools.sanitized(0, good) == {"summary": "ERROR SUMMARY: 0 errors"}
    bad = "========= Invalid __global__ read of size 16 bytes\n========= ERROR SUMMARY: 3 errors\n"
    assert tools.sanitized(0, bad) == {
        "error": "exit code 0: ERROR SUMMARY: 3 errors Invalid __global__ read of size 16 bytes"
    }
    race = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    assert "1 hazard displayed" in tools.sanitized(0, race)["error"]
    assert tools.sanitized(1, good)["error"].startswith("exit code 1")
    assert tools.sanitized(0, "killed") == {"error": "exit code 0:"}
    name = "lts__t_sectors_op_read.sum"
    text = (
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        f'"0","q4jax_linear","{name}","sector","7"\n'
        f'"1","q4jax_linear","{name}","sector","262,144"\n'
        '"1","q4jax_linear","other","","5"\n'
    )
    assert tools.counted(text) == {name: "262,144 sector"}
    assert tools.counted("==ERROR== no permission") == {}


def test_a_tool_that_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(tools.shutil, "which", lambda *_, **__: None)
    assert tools.counters(1, False) == {"unavailable": "ncu is not installed"}
    missing = {"unavailable": "compute-sanitizer is not installed"}
    assert tools.sanitize(1, False) == {"memcheck": missing, "racecheck": missing}


def fake_bench(left=100.0):
    budget = types.SimpleNamespace(left=lambda: left, spent=lambda: left <= 0)
    return types.SimpleNamespace(kernels="pallas", budget=budget)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    batches = []
    monkeypatch.setattr(
        timings, "_measure", lambda bench, batch, times: batches.extend(batch) or []
    )
    rows = [goals.Row("linear", 64, 128, 8), goals.Row("linear_transpose", 64, 128, 8)]
    timings.measure_rows(fake_bench(), rows, ["triton"], {("pallas", "linear")})
    assert batches == [
        (rows[0], ["dense", "triton", "dequantize + dot"]),
        (rows[1], ["dense", "pallas", "triton", "dequantize + dot"]),
        (rows[0], ["xla"]),
        (rows[1], ["xla"]),
    ]
    batches.clear()
    timings.measure_rows(fake_bench(), rows[1:], [], {("pallas", "dequantize")})
    assert batches == [(rows[1], ["dense", "pallas"]), (rows[1], ["xla"])]


def test_what_time_does_not_allow_is_named():
    rows = [goals.Row("linear", 64, 128, 8)]
    times, dropped, failures = timings.measure_rows(fake_bench(left=0.0), rows, [], set())
    assert (times, failures) == ({}, [])
    assert dropped == [f"{rows[0]}: dense, pallas, dequantize + dot", f"{rows[0]}: xla"]


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(device, "gpu", lambda: None)
    assert run.main(["--step", "check", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["--step", "--out"])
def test_arguments_that_must_be_given(missing, capsys):
    argv = {"--step": "check", "--out": "x"}
    del argv[missing]
    with pytest.raises(SystemExit):
        run.main([text for pair in argv.items() for text in pair])
    assert missing in capsys.readouterr().err


def test_order_of_rows():
    rows = goals.rows()
    assert len(rows) == len(set(rows)) == 7 * (13 * 2 + 2)
    assert rows[0] == goals.Row("linear", 4096, 4096, 1)
    assert rows.index(goals.Row("linear", 28672, 8192, 1)) < 10
    assert rows[-1] == goals.Row("linear_transpose", 4096, 11008, 2)


@pytest.mark.parametrize(
    ("m", "floor", "aim"), [(1, 2.2, 2.7), (16, 2.0, 3.0), (64, 1.0, 1.5), (4096, 0.95, 0.98)]
)
def test_goals_against_the_dense_product(m, floor, aim):
    goal = goals.goals(goals.Row("linear", 4096, 4096, m), 2**23)[0]
    assert (goal.metric, goal.floor, goal.aim) == (goals.DENSE, floor, aim)
    assert [goal.verdict(v) for v in (floor - 0.01, floor, aim)] == ["missed", "floor", "aim"]


def test_goal_of_bandwidth_is_for_large_weights():
    row = goals.Row("linear", 28672, 8192, 1)
    assert goals.BANDWIDTH in [goal.metric for goal in goals.goals(row, 2**27)]
    assert goals.BANDWIDTH not in [goal.metric for goal in goals.goals(row, 2**23)]
    assert [goal.metric for goal in goals.goals(goals.Row("linear", 64, 64, 256), 2**20)] == [
        goals.BITSANDBYTES
    ]


def profile(*lines):
    """Planes as the profiler gives them: lines are (name, [(start, duration), ...])."""
    event = types.SimpleNamespace
    made = [
        event(name=name, events=[event(start_ns=s, duration_ns=d) for s, d in events])
        for name, events in lines
    ]
    host = event(name="/host:CPU", lines=[event(name="python", events=[made[0].events[0]])])
    return event(planes=[host, event(name="/device:GPU:0", lines=made)])


def test_times_from_a_profile():
    second = int(2e7)
    stream = [(0, 10), (20, 10), (40, 10), (60, 30), (second, 5), (second + 3, 4)]
    recorded = profile(("XLA Ops", [(0, 1000)]), ("Stream #7(Compute)", stream))
    first, last = clock.split(clock.kernel_intervals(recorded), 2)
    assert clock.busy(first) == 60
    assert clock.busy(last) == 7
    assert clock.median_busy(first, 2) == 30
    assert clock.median_busy(first, 3) == 20
    with pytest.raises(ValueError, match="2 groups of kernels, not 3"):
        clock.split(clock.kernel_intervals(recorded), 3)


@pytest.mark.skipif(device.gpu() is not None, reason="there is something to record on a GPU")
def test_without_kernels_in_the_profile_the_wall_clock_is_taken():
    job = clock.Job("key", lambda x, w: x @ w, jax.numpy.eye(4), [jax.numpy.eye(4)], 1.0)
    job.plan(run_us=1, most_calls=1)
    job.compile()
    timer = clock.Clock(job, rounds=2)
    assert timer.kind == "wall"
    assert timer.reason == "ValueError: the profiler recorded 0 groups of kernels, not 1"


def test_what_was_measured_survives_an_error(monkeypatch):
    def measure(bench, batch, times):
        raise RuntimeError("no memory")

    monkeypatch.setattr(timings, "_measure", measure)
    row = goals.Row("quantize", 64, 128)
    _, dropped, failures = timings.measure_rows(fake_bench(), [row], [], set())
    assert (dropped, failures) == ([], [{"case": str(row), "reason": "RuntimeError: no memory"}])


def test_the_program_calls_the_operation_on_each_weight():
    job = clock.Job("key", lambda x, w: x @ w, jax.numpy.eye(4), [], 1.0)
    job.weights = [jax.numpy.full((4, 4), i) for i in (1.0, 2.0)]
    job.plan(run_us=20, most_calls=4)
    assert (job.calls, job.trips) == (4, 5)
    job.compile()
    assert job.error is None
    assert [float(y[0, 0]) for y in job.run()] == [1, 2, 1, 2]
    [us] = clock.Clock(rounds=2).microseconds([job])
    assert us > 0


def test_a_failure_of_compilation_is_kept():
    job = clock.Job("key", lambda x, w: x @ w, jax.numpy.eye(4), [jax.numpy.eye(3)], 1.0)
    job.plan(run_us=1, most_calls=1)
    job.compile()
    assert job.error.startswith("TypeError: ")


def test_each_call_waits_for_the_one_before():
    """In what a GPU is given; XLA's CPU compiler drops the barriers and merges the products."""
    x, w = jax.numpy.ones((2, 64)), jax.numpy.ones((64, 64))
    program = jax.jit(clock.chain(lambda x, w: x @ w, calls=6, trips=3))
    text = program.trace(x, [w, w + 1]).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.optimization_barrier") == 6
    assert text.count("stablehlo.dot_general") == 1  # in a function that is called six times


def test_a_tile_is_tried_without_being_in_the_table():
    chosen = tiles.choose(8, (64, 128), "bfloat16", transpose=False)
    with tiles.override(TILE):
        tried = tiles.choose(8, (64, 128), "bfloat16", transpose=False)
    assert (tried.m, tried.n, tried.k, tried.warps) == (32, 32, 64, 4)
    assert chosen == tiles.choose(8, (64, 128), "bfloat16", transpose=False) != tried


def test_table_is_written_as_it_is_laid_out(tmp_path):
    table = json.loads(tune.TABLE.read_text())
    tune.save(table, tmp_path / "tiles.json")
    tiles.use_table(None)
    assert (tmp_path / "tiles.json").read_text() == tune.TABLE.read_text()
    assert tiles.crossover("linear", "bfloat16") == table["crossover"]["linear"]["16 bits"]


@pytest.mark.parametrize("operation", ["linear", "linear_transpose"])
@pytest.mark.parametrize("dtype_class", ["16 bits", "float32"])
@pytest.mark.parametrize("last_m", [16, 32, 64, 2**20])
def test_grids_are_small_and_serve_their_rows(operation, dtype_class, last_m):
    found = tune.grid(operation, dtype_class, last_m)
    assert 4 <= len(found) <= 40
    assert len(found) == len(set(found))
    assert all(tile.m >= min(last_m, 32) for tile in found)


def test_pytorch_missing_is_said(monkeypatch):
    done = types.SimpleNamespace(stdout="", stderr="Traceback\nModuleNotFoundError: no torch\n")
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **kwargs: done)
    means = types.SimpleNamespace(
        weights=types.SimpleNamespace(cache_bytes=1), clock=clock.Clock(), budget=None
    )
    about, times = bench.torch_peer([], means, 1)
    assert (about["unavailable"], times) == ("ModuleNotFoundError: no torch", {})


def test_table_names_failures_last():
    failure = {"case": "linear nf4", "reason": "3 of 480 outside"}
    results = {
        "step": "check",
        "about": {"device": "GPU", "date": "today", "python": "3", "versions": {"jax": "1"}},
        "dry_run": False,
        "checks": {"pallas": {"run": 2, "failures": [failure]}, "triton": {"unavailable": "no"}},
        "failures": [failure],
    }
    text = report.table(results)
    assert "- `pallas`: 2 checks, 1 failed\n" in text
    assert "- `triton` is not available: no" in text
    assert text.endswith("**1 failed**\n- FAILED linear nf4: 3 of 480 outside\n")
