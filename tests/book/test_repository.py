"""One repository address, and workflows that are given no more than they need."""

import re
import subprocess
import sys

import pytest
import yaml

from tools import notebooks, repository

OTHER = "https://example.org/group/other-book"


@pytest.fixture(scope="module")
def texts(root, files):
    """What every file of the checkout says, where it is text."""
    said = {}
    for name in files:
        try:
            said[name] = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return said


def install_cell(root):
    cell, _ = notebooks.from_text(root / "tools" / "install_cell.md")
    return cell.cells[0]


# the address


def test_every_notebook_starts_with_the_install_cell_of_the_configured_address(root):
    expected = install_cell(root)
    assert f'"kexue-utils @ git+{repository.address(root)}"' in expected.source
    for chapter in notebooks.chapters(root):
        path = notebooks.notebook_path(root, chapter)
        first = next(cell for cell in notebooks.load(path).cells if cell.cell_type == "code")
        assert (first.source, first.metadata) == (expected.source, expected.metadata), path
        assert first.outputs == [], path


def test_only_the_listed_places_name_the_address(root, texts):
    listed = {path.relative_to(root).as_posix() for place in repository.PLACES for path in root.glob(place)}
    name = repository.path_of(repository.address(root))
    naming = {file for file, text in texts.items() if name in text}
    assert "_config.yml" in naming and "tools/install_cell.md" in naming
    assert naming <= listed


def test_set_repo_leaves_the_old_address_nowhere(root, texts, copy):
    old = repository.path_of(repository.address(root))
    named = {name: text.count(old) for name, text in texts.items() if old in text}
    changed = {path.relative_to(copy).as_posix() for path in repository.rewrite(copy, OTHER)}
    assert changed == set(named)
    assert repository.address(copy) == OTHER
    for name, count in named.items():
        text = (copy / name).read_text(encoding="utf-8")
        assert old not in text and text.count("group/other-book") == count, name
    for name in set(texts) - changed:
        assert (copy / name).read_text(encoding="utf-8") == texts[name], name


def test_set_repo_leaves_a_book_that_may_be_published(copy):
    repository.rewrite(copy, OTHER)
    assert notebooks.verify(copy) == []
    assert f"git+{OTHER}" in install_cell(copy).source
    assert repository.rewrite(copy, OTHER) == []


def test_set_repo_back_gives_the_same_bytes(root, texts, copy):
    repository.rewrite(copy, OTHER)
    repository.rewrite(copy, repository.address(root))
    for name, text in texts.items():
        assert (copy / name).read_text(encoding="utf-8") == text, name


def test_names_inside_other_addresses_follow_and_longer_names_do_not(tmp_path):
    (tmp_path / "_config.yml").write_text("repository: {url: https://github.com/a/book}\n", encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text("https://hub.example/github/a/book/blob https://github.com/a/books a/book", encoding="utf-8")
    repository.rewrite(tmp_path, OTHER)
    said = "https://hub.example/github/group/other-book/blob https://github.com/a/books a/book"
    assert readme.read_text(encoding="utf-8") == said


@pytest.mark.parametrize(
    "url",
    ["", "x", "http://host/a/b", "https://host/a", "https://host/a/b/", "https://host/a/b.git", "https://h/a/b\n"],
)
def test_a_bad_address_is_refused_before_anything_is_written(copy, url):
    before = (copy / "_config.yml").read_bytes()
    with pytest.raises(ValueError, match="must be https://<host>/<owner>/<name>"):
        repository.rewrite(copy, url)
    assert (copy / "_config.yml").read_bytes() == before


def test_the_command_without_an_address_says_what_it_needs(root):
    ran = subprocess.run([sys.executable, "-m", "tools.repository", ""], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 2 and "URL=https://" in ran.stderr


# versions


def test_every_requirement_has_an_exact_version_that_satisfies_it(root):
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    exact = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert all(re.fullmatch(r"==[\w.+]+", str(pin.specifier)) for pin in pins)
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project = declared["project"]
    extras = [name for extra in project["optional-dependencies"].values() for name in extra]
    for line in project["dependencies"] + extras + declared["build-system"]["requires"]:
        wanted = Requirement(line)
        assert ">=" in str(wanted.specifier), f"{line}: no lower bound"
        assert wanted.specifier.contains(exact[canonicalize_name(wanted.name)]), line


# workflows


def workflows(root):
    paths = sorted((root / ".github" / "workflows").glob("*.yml"))
    assert paths
    return {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths}


def test_actions_are_pinned_by_full_version(root):
    used = [
        step["uses"]
        for flow in workflows(root).values()
        for job in flow["jobs"].values()
        for step in job["steps"]
        if "uses" in step
    ]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", action) for action in used)


def test_what_executes_notebooks_may_only_read_and_keeps_no_credentials(root):
    for name, flow in workflows(root).items():
        assert flow["permissions"] == {"contents": "read"}, name
        for job in flow["jobs"].values():
            steps = job["steps"]
            commands = [step["run"] for step in steps if "run" in step]
            if commands:
                assert "permissions" not in job and "secrets" not in str(job), name
            for step in steps:
                if step.get("uses", "").startswith("actions/checkout@"):
                    assert step["with"]["persist-credentials"] is False, name


def test_pages_are_published_from_main_out_of_the_validated_build_only(root):
    jobs = workflows(root)["checks.yml"]["jobs"]
    publish = jobs["publish"]
    assert publish["needs"] == "check" and "refs/heads/main" in publish["if"]
    assert publish["permissions"] == {"pages": "write", "id-token": "write"}
    assert all("run" not in step for step in publish["steps"])
    steps = jobs["check"]["steps"]
    runs = [number for number, step in enumerate(steps) if step.get("run") == ".ci/run"]
    uploads = [number for number, step in enumerate(steps) if "upload-pages-artifact" in step.get("uses", "")]
    assert len(runs) == len(uploads) == 1 and runs < uploads
    assert steps[uploads[0]]["with"]["path"] == "_build/html"
