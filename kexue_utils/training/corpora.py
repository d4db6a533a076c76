"""Text whose every byte is known: shipped with the package, or found in an installed one and checked by its SHA-256."""

import hashlib
import json
import platform
import sysconfig
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np

SYMPY = "9f0ece20da5d8fa69223ac9398c85f88f5d35055a05196dc9459353d4df343e3"


def pydoc_topics():
    """The 465 048 characters of Python's help topics as CPython 3.11.7 has them.

    `pydoc_data.topics` differs between Python versions (465 048 characters in 3.11.7, 492 233 in 3.12.1, 510 664 in
    3.13.0), and so would every number measured on it; hence the package carries one version, under the Python Software
    Foundation's licence, which stands with source and SHA-256 in the same file. ValueError if the text is not that one.
    """
    file = json.loads(files("kexue_utils.training").joinpath("data", "pydoc_topics.json").read_text("utf-8"))
    _known(file["text"].encode(), file["sha256"], "data/pydoc_topics.json")
    return file["text"]


def python_sources(package="sympy", sha256=SYMPY):
    """{path: bytes} of the .py files of an installed package, sorted by path, without importing it.

    The default is sympy 1.14.0: 1 532 files, 26 168 818 bytes. ModuleNotFoundError if it is not installed; ValueError
    if its files, joined in order, have another SHA-256.
    """
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"package = {package!r} is not installed: python -m pip install sympy==1.14.0")
    root = Path(spec.submodule_search_locations[0])
    paths = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    texts = {name: path.read_bytes() for name, path in paths}
    _known(b"".join(texts.values()), sha256, f"the sources of {package!r}")
    return texts


def standard_library():
    """({path: bytes}, provenance): the .py files of this Python's standard library without its tests, sorted by path.

    Every version of Python has another text, so a record keeps {python, files, bytes, sha256} of what it was run on.
    """
    root, left_out = Path(sysconfig.get_paths()["stdlib"]), {"site-packages", "dist-packages", "test", "tests"}
    paths = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    texts = {name: path.read_bytes() for name, path in paths if not left_out & set(Path(name).parts)}
    joined = b"".join(texts.values())
    provenance = {"python": platform.python_version(), "files": len(texts), "bytes": len(joined)}
    return texts, provenance | {"sha256": hashlib.sha256(joined).hexdigest()}


def split_files(texts, held_out):
    """(train, validation, test) of {path: bytes}: a file goes where the SHA-256 of its path says, so that nothing of
    a held-out file is ever trained on; each of the last two gets a share of about `held_out` of the files.
    """
    if not 0 < held_out < 0.5:
        raise ValueError(f"held_out = {held_out!r}: it must be positive and below a half")

    def place(name):  # uniform on [0, 1)
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64

    train = {name: text for name, text in texts.items() if place(name) >= 2 * held_out}
    validation = {name: text for name, text in texts.items() if held_out <= place(name) < 2 * held_out}
    return train, validation, {name: text for name, text in texts.items() if place(name) < held_out}


def _known(data, sha256, what):
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{what}: SHA-256 is {found}, it must be {sha256}; install the pinned version")


def encode_common(text, size=48):
    """(ids, characters): the size − 1 most frequent characters of the lower-cased text get ids 0, 1, …, all others the
    last id; ties go to the smaller code point. ids are int64, of shape (len(text),).
    """
    codes = np.frombuffer(text.lower().encode("utf-32-le"), dtype=np.uint32)
    values, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")[: size - 1]
    rank = np.full(len(values), len(order))
    rank[order] = np.arange(len(order))
    return rank[inverse].astype(np.int64), [chr(c) for c in values[order]]


def deal_blocks(data, seed, held_out, size=4096):
    """(train, validation, test): blocks of `size` bytes, ordered by the SHA-256 of "seed/number", dealt out as
    `held_out` blocks of test, as many of validation, and the rest; the incomplete last block is left out.

    data: bytes or a 1-d array. ValueError if nothing would be left to train on. Whole files would make one split
    incomparable with the next: a few are huge and unlike the others (tables of numbers).
    """
    data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    blocks = data[: len(data) // size * size].reshape(-1, size)
    if not 0 < 2 * held_out < len(blocks):
        raise ValueError(f"held_out = {held_out!r}: it must be positive and below half of {len(blocks)} blocks")
    order = sorted(range(len(blocks)), key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest())
    parts = order[2 * held_out :], order[held_out : 2 * held_out], order[:held_out]
    return tuple(blocks[part].flatten() for part in parts)
