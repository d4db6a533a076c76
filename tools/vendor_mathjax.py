"""Rebuild `book/_static/mathjax` from the npm packages at the versions pinned here.

`python tools/vendor_mathjax.py` replaces the folder (needs npm); with `--check` it only compares and exits 1 on any
difference. The book loads MathJax 4 piece by piece with one complete font, because the ready-made bundles carry a menu,
a speech engine and a font of which most is fetched on demand: about 1 MB here instead of 60 MB there.
"""

import argparse
import base64
import filecmp
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "book" / "_static" / "mathjax"

# package: (version, integrity that npm publishes, {file in the package: file in TARGET}); a folder is taken whole
PACKAGES = {
    "mathjax": (
        "4.1.3",
        "sha512-BN/8Pkgn7G1pIDYJqd9md+JHsE/jydSYbyOZnSdSA0WziuVO8mRxdYiWFumkVVly/8U+hm9DpIIoWuvySverzw==",
        {
            name: name
            for name in (
                "LICENSE",
                "startup.js",
                "core.js",
                "input/tex-base.js",
                "input/tex/extensions/ams.js",
                "input/tex/extensions/boldsymbol.js",
                "input/tex/extensions/newcommand.js",
                "input/tex/extensions/textmacros.js",
                "output/chtml.js",
                "a11y/assistive-mml.js",
            )
        },
    ),
    "@mathjax/mathjax-tex-font": (
        "4.1.3",
        "sha512-9B78brBEmmAwyumaREIyM1gF2HgDamDIXA36UyeXWxX7XrpLdmoSB5NLIf/c6tEA4L6xNrIdMxfgY6YX/kcSNw==",
        {"chtml.js": "mathjax-tex/chtml.js", "chtml/woff2": "mathjax-tex/chtml/woff2"},
    ),
}


def fetch(name: str, version: str, integrity: str, folder: Path) -> Path:
    """Unpack one npm package under `folder`; ValueError if it is not the package that was pinned."""
    packed = subprocess.run(
        ["npm", "pack", f"{name}@{version}", "--json", "--pack-destination", str(folder)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    archive = folder / Path(json.loads(packed.stdout)[0]["filename"]).name.replace("/", "-").lstrip("@")
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != integrity:
        raise ValueError(f"{name}@{version} has integrity {found}, pinned is {integrity}")
    out = folder / archive.stem
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return out / "package"


def build(target: Path) -> None:
    """Put the chosen files of every package under `target`, which must not exist."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, (version, integrity, files) in PACKAGES.items():
            package = fetch(name, version, integrity, Path(scratch))
            for source, name_here in files.items():
                copy = shutil.copytree if (package / source).is_dir() else shutil.copyfile
                (target / name_here).parent.mkdir(parents=True, exist_ok=True)
                copy(package / source, target / name_here)


def tree(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if the folder differs")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "mathjax"
        build(fresh)
        if not check:
            shutil.rmtree(TARGET, ignore_errors=True)
            shutil.copytree(fresh, TARGET)
            return 0
        names = tree(fresh) | tree(TARGET)
        same, _, _ = filecmp.cmpfiles(fresh, TARGET, map(str, names), shallow=False)
        different = sorted({str(name) for name in names} - set(same))
        print("\n".join(f"differs: {name}" for name in different) or "book/_static/mathjax is as pinned")
        return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
