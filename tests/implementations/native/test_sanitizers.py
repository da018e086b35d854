"""The C++ under the compiler's sanitizers, without Python or XLA."""

import concurrent.futures
import pathlib
import shutil
import subprocess

import pytest

from q4jax.core.codebooks import CODEBOOKS
from q4jax.native import library

SOURCES = pathlib.Path(library.__file__).parent / "src"
STRESS = pathlib.Path(__file__).parents[2] / "support" / "native_stress.cc"
compiler = shutil.which("g++")


@pytest.mark.heavy
@pytest.mark.skipif(compiler is None, reason="there is no g++")
@pytest.mark.skipif(not SOURCES.exists(), reason="installed without the sources")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers(sanitizers, tmp_path):
    tables = [library.code_table(CODEBOOKS[name]) for name in ("nf4", "fp4")]
    (tmp_path / "tables").write_bytes(b"".join([*tables, library.scale_table()]))
    sources = [p for p in SOURCES.glob("*.cc") if p.name != "ffi.cc"]
    flags = [
        *("-std=c++17", "-O1", "-g", "-ffp-contract=off", "-pthread"),
        *(f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{SOURCES}"),
    ]

    def build(*files):
        subprocess.run([compiler, *flags, *map(str, files)], check=True, timeout=900)

    def to_object(source):
        build("-c", source, "-o", tmp_path / f"{source.stem}.o")
        return tmp_path / f"{source.stem}.o"

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = pool.map(to_object, [*sources, STRESS])
        build(*objects, "-o", tmp_path / "stress")
    run = subprocess.run(
        [tmp_path / "stress", tmp_path / "tables"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "portable"
