"""What a notebook may bring onto the page; every rule is shown to refuse something."""

from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.notebooks import lint

PATH = Path("notebooks/part/sample.ipynb")


def problems(*cells):
    return list(lint(new_notebook(cells=list(cells)), PATH))


def shown(**data):
    """A code cell whose only output has the MIME types given, `_` for `/`."""
    output = new_output("display_data", data={mime.replace("_", "/", 1): value for mime, value in data.items()})
    return new_code_cell("1", execution_count=1, outputs=[output])


HARMLESS_MARKDOWN = [
    "$x<y$ and $y>z$, so once is enough",
    "an `iframe`, a script, and javascript as words",
    '<details><summary>Solution</summary>\n\nBy parts.</details> <img src="a.png" alt="only one">',
    "[post](https://kexue.fm/archives/9648)",
]


@pytest.mark.parametrize("source", HARMLESS_MARKDOWN)
def test_ordinary_text_passes(source):
    assert problems(new_markdown_cell(source)) == []


def test_allowed_outputs_pass():
    cell = shown(text_plain="1 < 2", image_png="iVBORw0KGgo=")
    cell.outputs.append(new_output("display_data", data={"image/svg+xml": "<svg><metadata/><path d='M0 0'/></svg>"}))
    bundle = {"text/plain": "✓", "application/vnd.derivation-ledger+json": {"label": "a-b"}}
    cell.outputs.append(new_output("display_data", data=bundle))
    glue = {"application/papermill.record/text/plain": "0.18"}
    cell.outputs.append(new_output("display_data", data=glue, metadata={"scrapbook": {"name": "kl"}}))
    cell.outputs.append(new_output("stream", name="stdout", text="done"))
    assert problems(cell) == []


ACTIVE = [
    "<script>alert(1)</script>",
    "<SCRIPT src=//x.y></SCRIPT>",
    "< script>",
    '<img src=x onerror="alert(1)">',
    "<img src=x\nonerror=alert(1)>",
    "<svg/onload=alert(1)>",
    '<iframe src="https://x.y"></iframe>',
    "<object data=x></object>",
    "<embed src=x>",
    "[click](javascript:alert(1))",
    "[click](JavaScript :alert(1))",
    '<a href="data:text/html,x">y</a>',
    '<meta http-equiv="refresh" content="0">',
    '<base href="https://x.y">',
    '<link rel="stylesheet" href="https://x.y">',
]


@pytest.mark.parametrize("source", ACTIVE)
def test_active_content_is_refused_in_text_and_in_outputs(source):
    (in_text,) = problems(new_markdown_cell("fine"), new_markdown_cell(source))
    assert in_text.startswith(f"{PATH}: cell 1 holds active content: ")
    assert any("cell 0 holds active content" in problem for problem in problems(shown(**{"image_svg+xml": source})))


def test_active_content_is_refused_in_the_bundle_and_on_stdout():
    bundle = {"found": ["<script>alert(1)</script>"]}
    assert "active content" in problems(shown(**{"application_vnd.derivation-ledger+json": bundle}))[0]
    printed = new_output("stream", name="stdout", text="<script>alert(1)</script>")
    assert "active content" in problems(new_code_cell("1", execution_count=1, outputs=[printed]))[0]


@pytest.mark.parametrize(
    "mime",
    [
        "text/html",
        "text/markdown",
        "text/latex",
        "application/javascript",
        "application/vnd.jupyter.widget-view+json",
        "image/gif",
        "application/papermill.record/text/html",
    ],
)
def test_other_types_are_refused(mime):
    (problem,) = problems(shown(**{mime.replace("/", "_", 1): "x", "text_plain": "x"}))
    assert f"cell 0 shows {mime}; allowed are" in problem


def test_a_failed_cell_is_refused():
    failed = new_output("error", ename="ValueError", evalue="beta", traceback=[])
    (problem,) = problems(new_code_cell("1", execution_count=1, outputs=[failed]))
    assert "cell 0 failed: ValueError: beta" in problem


def test_an_address_in_memory_is_refused():
    (problem,) = problems(shown(text_plain="<function f at 0x7f8a12345670>"))
    assert "at 0x7f8a12345670" in problem


@pytest.mark.parametrize("source", ["# NBVAL_SKIP\n1", "1\n#NBVAL_IGNORE_OUTPUT", "# PYTEST_VALIDATE_IGNORE_OUTPUT"])
def test_a_comment_that_turns_validation_off_is_refused(source):
    (problem,) = problems(new_code_cell(source, execution_count=1))
    assert "asks not to be checked" in problem


@pytest.mark.parametrize("tag", ["nbval-skip", "nbval-ignore-output", "nbval-raises-exception", "raises-exception"])
def test_a_tag_that_turns_validation_off_is_refused(tag):
    (problem,) = problems(new_code_cell("1", execution_count=1, metadata={"tags": [tag]}))
    assert f"asks not to be checked: {tag}" in problem
