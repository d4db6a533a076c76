"""A sound book builds without a warning, and its pages say what the checks say."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from miniature import build, edit_ledger, equation, html, text, write_book

from kexue_utils.ledger import digest
from kexue_utils.ledger.digest import code_digest
from kexue_utils.ledger.graph import layout

FUNCTIONS = {"halves.half": {"2 → 3": "rejected", "x / 2 → x * 2": "survived"}}
OTHERS = {"halves.half": {"2 → 3": "survived", "x / 2 → x * 2": "rejected", "x → -x": "survived"}}
CHAPTERS = {
    "one": [
        *equation("one-start"),
        *equation("one-half", "h = x/2", uses=["one-start"], functions=FUNCTIONS, kind="exact"),
        *equation("one-third", "t = x/3", uses=["one-half"], functions=OTHERS, same={"half: x → -x": "even in <x>"}),
    ],
    "two": [
        *equation("two-cited", state="cited", kind="cited", evidence="Gauss 1801", mutants={}),
        *equation("two-rest", uses=["two-cited", "one-half"], found=["post 1: wrote 2 & meant 3"],
                  mutants={"a": "survived", "b": "rejected", "c": "did not run"}, same={"a": "symmetric"}),
        *equation("two-top", uses=["one-third", "one-start"]),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = write_book(tmp_path_factory.mktemp("sound"), CHAPTERS)
    assert build(folder) == (0, "")
    return folder


def words(fragment):
    return " ".join(re.sub(r"<[^>]+>", " ", fragment).split())


def test_every_equation_has_a_badge_that_leads_to_its_row_and_back(sound):
    page, ledger = html(sound, "notebooks/one"), html(sound, "ledger")
    badges = re.findall(r'<a class="ledger-badge[^>]*href="([^"]+)">(.*?)</a>', page)
    assert [words(text) for _, text in badges] == [
        "✓ Equation one-start, checked: numeric · 1/1 mutants",
        "✓ Equation one-half, checked: exact · 1/1 mutants",
        "✓ Equation one-third, checked: numeric · 1/1 mutants",
    ]
    for href, _ in badges:
        target, anchor = href.split("#")
        assert target == "../ledger.html"
        row = ledger[ledger.index(f'<tr id="{anchor}">') :].split("</tr>")[0]
        back = re.search(r'href="notebooks/one\.html#([^"]+)"', row)[1]
        assert f'id="{back}"' in page


def test_ids_stay_unique_and_equations_keep_their_numbers(sound):
    for name in ("notebooks/one", "notebooks/two", "ledger"):
        ids = re.findall(r'\bid="([^"]+)"', html(sound, name))
        assert len(ids) == len(set(ids))
    assert len(re.findall(r'class="eqno"', html(sound, "notebooks/one"))) == 3


def test_the_record_of_a_check_stays_off_the_page(sound):
    page = html(sound, "notebooks/one")
    assert "0123456789abcdef" not in page and "✓ one-half · exact" in page


def test_ledger_page_counts_what_the_checks_say(sound):
    page = words(html(sound, "ledger"))
    assert "Coverage 5/6" in page
    assert "Equations’ mutants 5/6" in page  # one survivor; the mutant that did not run counts neither way
    assert "Functions’ mutants 2/3" in page  # each rejected by at least one of the two checks, but for one
    assert "a symmetric" in page and "even in &lt;x&gt;" in page
    assert "post 1 : wrote 2 &amp; meant 3 Refuted by the check of (2) two-rest" in page or "two-rest" in page
    assert "exact 1" in page and "cited 1" in page and "numeric 4" in page


def test_coverage_of_a_chapter_stands_at_its_foot_or_where_it_is_put(sound, tmp_path):
    assert "coverage 3/3" in words(html(sound, "notebooks/one"))
    assert "coverage 2/3" in words(html(sound, "notebooks/two"))
    here = [text("```{ledger-coverage}\n```\n\nThe end of the top."), *equation("one-start")]
    assert build(write_book(tmp_path, {"one": here})) == (0, "")
    page = words(html(tmp_path, "notebooks/one"))
    assert page.count("coverage 1/1") == 1 and page.index("coverage 1/1") < page.index("The end of the top")


def test_graph_is_solid_only_on_checked_ground(sound):
    page = html(sound, "ledger")
    nodes = re.findall(r'<a href="[^"]+" class="(ledger-\w+)"><title>([\w-]+)', page)
    assert {label for kind, label in nodes if kind == "ledger-open"} == {"two-cited", "two-rest"}
    assert {label for kind, label in nodes if kind == "ledger-solid"} == {
        "one-start",
        "one-half",
        "one-third",
        "two-top",
    }
    row = page[page.index('<tr id="ledger-two-top">') :].split("</tr>")[0]
    assert words(row).endswith("one-third , (1) one-start")  # the same in words


def test_layout_puts_every_node_below_what_it_uses_and_nothing_on_a_box():
    uses = {i: sorted({i // 2, i // 3, max(i - 5, 0)} - {i}) for i in range(40)}
    boxes, lines, width, height = layout(uses, dict.fromkeys(uses, 80))
    assert all(boxes[i][1] > boxes[j][1] for i in uses for j in uses[i])
    for i in uses:
        x, y, w = boxes[i]
        assert 40 <= x <= width - 40 and 14 <= y <= height - 14
        assert all(boxes[j][1] != y or abs(boxes[j][0] - x) >= 80 for j in uses if j != i)
    assert len(lines) == sum(map(len, uses.values()))
    for points in lines:
        for (x, y), (_, to) in zip(points, points[1:], strict=False):
            assert not any(
                y <= mid - 14 and mid + 14 <= to and abs(x - middle) < 40 for middle, mid, _ in boxes.values()
            )


def test_pages_are_written_again_when_the_ledger_changes(tmp_path):
    write_book(tmp_path, CHAPTERS)
    assert build(tmp_path)[0] == 0
    before = html(tmp_path, "notebooks/one")
    edit_ledger(tmp_path, lambda ledger: ledger["equations"]["one-half"]["check"].update(kind="symbolic"))
    assert build(tmp_path)[0] == 0
    assert before.count("symbolic") == 0 and "symbolic · 1/1" in html(tmp_path, "notebooks/one")


def test_numbers_on_the_ledger_page_follow_the_order_of_the_chapters(tmp_path):
    write_book(tmp_path, {"one": equation("x-one"), "two": equation("x-two")})
    assert build(tmp_path)[0] == 0 and "(2) x-two" in html(tmp_path, "ledger")
    index = tmp_path / "index.md"
    index.write_text(index.read_text().replace("one", "o").replace("two", "one").replace("/o\n", "/two\n"))
    assert build(tmp_path)[0] == 0 and "(1) x-two" in html(tmp_path, "ledger")


def test_a_second_build_that_reads_nothing_still_fails(tmp_path):
    write_book(tmp_path, {"one": [*equation("x-one"), text("$$\nc = d\n$$ (x-two)")]})
    for _ in range(2):
        status, said = build(tmp_path)
        assert status == 1 and "equation x-two: unchecked" in said


def test_reading_in_parallel_gives_the_same_pages(sound, tmp_path):
    write_book(tmp_path, CHAPTERS | {f"more{i}": equation(f"more-{i}") for i in range(6)})
    assert build(tmp_path, "-j", "2") == (0, "")
    assert html(tmp_path, "notebooks/two").count("ledger-badge") == html(sound, "notebooks/two").count("ledger-badge")
    assert "Coverage 11/12" in words(html(tmp_path, "ledger"))


def test_a_book_without_a_ledger_says_what_to_run(tmp_path):
    write_book(tmp_path, {"one": equation("x-one")}, collected=False)
    status, said = build(tmp_path)
    assert status == 1 and "there is no ledger.json; run `python -m kexue_utils.ledger collect`" in said


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 2, "equations": {}, "functions": {}}', '{"schema": 1}'])
def test_a_malformed_ledger_is_named(tmp_path, content):
    write_book(tmp_path, {"one": equation("x-one")})
    (tmp_path / "ledger.json").write_text(content)
    status, said = build(tmp_path)
    assert status != 0 and "ledger.json: not a ledger of schema 1" in said


def test_sources_of_installed_packages_are_found_and_one_message_names_all_that_is_stale(tmp_path):
    path = "kexue_utils/ledger/digest.py"
    now = code_digest(Path(digest.__file__).read_text(encoding="utf-8"))
    write_book(tmp_path, {"one": [*equation("x-one", ran={path: now}), *equation("x-two", ran={path: now})]})
    assert build(tmp_path) == (0, "")
    edit_ledger(tmp_path, lambda ledger: [e["check"].update(ran={path: "0"}) for e in ledger["equations"].values()])
    status, said = build(tmp_path)
    assert status == 1 and said.count("WARNING") == 1
    assert f"equation x-one: stale, like x-two: {path} has changed since its check ran; execute its" in said
    assert html(tmp_path, "notebooks/one").count("doubtful") == 2
    assert 'class="ledger-open"><title>' not in html(tmp_path, "ledger")  # they stand alone, and are not drawn
    edit_ledger(tmp_path, lambda ledger: ledger["equations"]["x-two"]["check"].update(uses=["x-one"], ran={path: now}))
    assert build(tmp_path)[0] == 1
    assert html(tmp_path, "ledger").count('class="ledger-open"><title>') == 2  # the stale one, and what rests on it


@pytest.mark.parametrize("builder", ["text", "latex", "dirhtml"])
def test_other_builders_are_left_in_peace(tmp_path, builder):
    write_book(tmp_path, CHAPTERS)
    assert build(tmp_path, builder=builder) == (0, "")


def test_rendering_needs_no_numerical_library():
    program = textwrap.dedent("""
        import sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("numpy", "sympy", "torch"):
                    raise ImportError(name)
        sys.meta_path.insert(0, Block())
        import kexue_utils.ledger.sphinx, kexue_utils.ledger.collect, kexue_utils.ledger.__main__
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_markup_in_a_record_reaches_the_page_as_text(tmp_path):
    nasty = "<script>alert(1)</script>"
    cells = equation("x-one", evidence=nasty, found=[f"{nasty}: {nasty}"], mutants={nasty: "survived", "b": "rejected"},
                     same={nasty: nasty})  # fmt: skip
    write_book(tmp_path, {"one": cells})
    assert build(tmp_path) == (0, "")
    assert nasty not in html(tmp_path, "ledger") and "&lt;script&gt;" in html(tmp_path, "ledger")
    assert json.loads((tmp_path / "ledger.json").read_text())["equations"]["x-one"]["check"]["evidence"] == nasty
