"""The tasks of development and CI: `nox -l` lists them, `nox -s lint tests` runs two.

Each has an environment of its own; with `--no-venv` a task installs into the current one.
"""

import json
import os
import pathlib
import shutil
import tempfile

import nox

ROOT = pathlib.Path(__file__).parent
NEWEST = ("3.15", "3.14", "3.13", "3.12")  # in this order, those that are installed
TORCH = "torch==2.13.0"  # the version of the golden vectors

nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
os.environ |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_COMPILE": "no"}


def find_python(*minors: str) -> str:
    """The first of these Pythons that runs here: on PATH, or among pyenv's."""
    versions = pathlib.Path(
        os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"), "versions"
    )
    for minor in minors:
        installed = sorted(versions.glob(f"{minor}.*/bin/python"), reverse=True)
        on_path = shutil.which(f"python{minor}")
        # A name on PATH may be a shim of pyenv's for a version that is not selected.
        for python in [*map(str, installed), *([on_path] if on_path else [])]:
            if not os.system(f'"{python}" -c "import ensurepip, venv" >/dev/null 2>&1'):
                return python
    return minors[-1]


def install(session: nox.Session, *packages: str) -> None:
    """Install into the session's environment, or into the current one."""
    env = {"Q4JAX_CXXFLAGS": os.environ.get("Q4JAX_CXXFLAGS", "-O1")}  # the kernels build quickly
    if isinstance(session.virtualenv, nox.virtualenv.PassthroughEnv):
        session.run("python", "-m", "pip", "install", "--quiet", *packages, env=env)
    else:
        session.install("--quiet", *packages, env=env)


def torch_for_cpu(session: nox.Session) -> str:
    """The requirement of a CPU build of torch; the task is skipped where the index has none."""
    report = pathlib.Path(session.create_tmp(), "torch.json")
    session.run(
        *("python", "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"),
        *("--report", str(report), TORCH),
    )
    version = json.loads(report.read_text())["install"][0]["metadata"]["version"]
    if not version.endswith("+cpu") and os.uname().sysname == "Linux":
        session.skip(f"the package index has no CPU build of torch, but {version}")
    return f"torch=={version}"


def pytest(session: nox.Session, *arguments: str, **env: str) -> None:
    """Run pytest with two workers."""
    session.run("python", "-m", "pytest", "-n", "2", *arguments, *session.posargs, env=env)


@nox.session
def tests(session: nox.Session) -> None:
    """The core tier, as the README runs it."""
    install(session, "-e", ".[test,examples]")
    pytest(session)


@nox.session
def heavy(session: nox.Session) -> None:
    """What the core tier leaves out: training on meshes, sanitizers, fuzzing, kills, notebooks."""
    install(session, "-e", ".[test,examples]")
    pytest(session, "-m", "heavy")


@nox.session
def lint(session: nox.Session) -> None:
    """Lint and format."""
    install(session, "ruff==0.17.*")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types."""
    install(session, "-e", ".", "mypy==2.4.*")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The site; a broken link or reference is an error."""
    install(session, "-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", "--site-dir", tempfile.mkdtemp())


@nox.session
def native(session: nox.Session) -> None:
    """The C++ kernels are in use; without them, a third of what may rest on them passes."""
    install(session, "-e", ".[test]")
    in_use = "import q4jax; s = q4jax.native.status(); print(s); assert s.isa == s.available[0]"
    session.run("python", "-c", in_use)
    areas = ("native", "contract", "golden", "ops", "nnx/test_linear", "linen/test_layers")
    folders = [str(path) for path in (ROOT / "tests").rglob("test_*.py")]
    chosen = [path for path in folders if any(area in path for area in areas)]
    sample = ("-m", "not slow and not heavy", "--share", "3")
    pytest(session, *sample, *sorted(chosen), Q4JAX_NATIVE="0")


@nox.session
def switches(session: nox.Session) -> None:
    """The functions, the layers and the models under JAX's strict promotion and 64-bit types."""
    install(session, "-e", ".[test]")
    strict = {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    files = ("test_switches.py", "ops/test_embedding.py", "implementations/test_differential.py")
    chosen = [str(ROOT / "tests" / file) for file in files]
    pytest(session, "-m", "not slow and not heavy", *chosen, **strict, JAX_ENABLE_X64="1")
    # Each part of a decoder is in one of these families.
    families = "gemma4_text-gpt_oss-deepseek_v3-qwen3_next-bloom-apertus-llama4_text-phimoe"
    logits = [
        f"tests/models/decoder/test_architectures.py::test_logits_of_transformers[{family}]"
        for family in families.split("-")
    ]
    pytest(session, *logits, **strict, JAX_ENABLE_X64="1")


@nox.session(python=find_python(*NEWEST))
def newest(session: nox.Session) -> None:
    """A fourth of the quick tests on the newest Python, with the newest jax; others in each run."""
    install(session, "-e", ".[test,examples]")
    pytest(session, "-m", "not slow and not heavy", "--share", "4")


@nox.session(python=find_python("3.13", "3.12"))
def aot(session: nox.Session) -> None:
    """The machine code of the GPU kernels, and their PTX executed on this CPU."""
    install(session, "-e", ".[test,aot]")
    pytest(session, "--dist", "loadgroup", "-m", "", "tests/implementations/gpu")


@nox.session(python=find_python("3.12"))
def emulate(session: nox.Session) -> None:
    """The CPU kernels for other processors, in emulators, which Python 3.12 alone has all of."""
    install(session, "-e", ".[test,emulate]")
    pytest(session, "-rs", "-m", "", "tests/implementations/native/test_emulated.py")


@nox.session(python=find_python("3.11"))
def cross(session: nox.Session) -> None:
    """Against the real bitsandbytes, transformers and PEFT, with a CPU build of torch."""
    install(session, torch_for_cpu(session), "-e", ".[test,cross]")
    # `-m heavy` has the several hundred classes of transformers that are not in the quick part.
    pytest(session, "-m", "not heavy", "tests/cross")


@nox.session(python=find_python("3.11"))
def trainers(session: nox.Session) -> None:
    """tunix's trainers on its own models in 4 bits, and their adapters in PEFT."""
    install(session, torch_for_cpu(session), "-e", ".[test,trainers]")
    pytest(session, "-m", "", "tests/integrations")


@nox.session(python=find_python("3.13", "3.12"))
def triton(session: nox.Session) -> None:
    """The Triton kernels, interpreted and compiled, with a jax that jax-triton works with."""
    install(session, "jax==0.11.2", "-e", ".[test,aot,triton]")
    pytest(session, "-m", "", "-k", "triton", "tests/implementations")


@nox.session(python=find_python("3.13", "3.12"))
def tpu(session: nox.Session) -> None:
    """Programs for TPUs, compiled without one: that they compile, and how good they are."""
    install(session, "-e", ".[test,tpu]")
    # Or jax would look for a TPU to run on.
    chosen = ("tests/implementations/tpu", "tests/implementations/mosaic/test_compile.py")
    pytest(session, "-m", "", *chosen, JAX_PLATFORMS="cpu")


@nox.session
def dist(session: nox.Session) -> None:
    """The sdist and the wheel, and the wheel alone in an environment of its own."""
    install(session, "build")
    folder = pathlib.Path(tempfile.mkdtemp())
    session.run("python", "-m", "build", "--outdir", str(folder), silent=True)
    session.run("python", "-m", "venv", str(folder / "alone"))
    python = str(folder / "alone" / "bin" / "python")
    wheels = map(str, folder.glob("*.whl"))
    session.run(python, "-m", "pip", "install", "--quiet", "--compile", *wheels, external=True)
    # Away from the source, which would be imported.
    with session.chdir(folder):
        for name in ("smoke.py", "import_time.py"):
            session.run(python, str(ROOT / ".ci" / name), external=True)
