"""The repository address: `_config.yml` decides, and `python -m tools.repository URL` writes another everywhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

# Every file that may name the address; a test looks for it in all the others.
PLACES = (
    "_config.yml",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "README.md",
    "pyproject.toml",
    "tools/install_cell.md",
    "book/**/*.md",
    "notebooks/**/*.ipynb",
)
ADDRESS = re.compile(r"https://[\w.-]+/([\w.-]+/[\w.-]+)")


def address(root: Path) -> str:
    """The address that `_config.yml` names."""
    return yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]


def path_of(url: str) -> str:
    """`owner/name` of an address; launch links and badges use it without the host.

    ValueError: `url` is not https://host/owner/name (it may not end in .git or a slash).
    """
    match = ADDRESS.fullmatch(url)
    if not match or url.endswith(".git"):
        raise ValueError(f"URL is {url!r}; it must be https://<host>/<owner>/<name>, with nothing after the name")
    return match[1]


def rewrite(root: Path, url: str) -> list[Path]:
    """Replace the present address, and its `owner/name` within other addresses, by `url`; the files that changed."""
    old = address(root)
    # an owner/name is only an address's where a slash comes before it, and not a longer word's beginning
    pattern = re.compile(rf"{re.escape(old)}(?![\w-])|(?<=/){re.escape(path_of(old))}(?![\w-])")
    new_path = path_of(url)
    changed = []
    for path in sorted({path for place in PLACES for path in root.glob(place)}):
        text = path.read_text(encoding="utf-8")
        renamed = pattern.sub(lambda found: url if found.group() == old else new_path, text)
        if renamed != text:
            path.write_text(renamed, encoding="utf-8")
            changed.append(path)
    return changed


def main() -> int:
    if len(sys.argv) != 2 or not sys.argv[1]:
        print("make set-repo needs URL=https://<host>/<owner>/<name>", file=sys.stderr)
        return 2
    try:
        changed = rewrite(Path(), sys.argv[1])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(map(str, changed)) or "nothing to change")
    return 0


if __name__ == "__main__":
    sys.exit(main())
