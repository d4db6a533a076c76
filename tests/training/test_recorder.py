"""The recorder on a registered toy; that the committed records fit today's sources."""

import json
import os
import subprocess
import sys

import pytest
import torch

from kexue_utils.training import load, recorder, registry
from kexue_utils.training.__main__ import main
from kexue_utils.training.progress import progress
from kexue_utils.training.recorder import RECORDED, Experiment, changed, confirm, record
from kexue_utils.training.sources import sources

CALLS = []


def toy_run(parameters, seeds, device, checkpoint):
    CALLS.append((parameters["x"], tuple(seeds)))
    if parameters["x"] in FAILING:
        raise KeyboardInterrupt
    return [{"test": [parameters["x"] + seed / 3, float("nan")]} for seed in seeds]


FAILING = set()
TOY = Experiment(
    title="toy",
    units=lambda smoke: {"one": {"x": 1}} if smoke else {"one": {"x": 1}, "two": {"x": 2}},
    run=toy_run,
    conclude=lambda units: {"mean": sum(r["test"][0] for u in units.values() for r in u["runs"])},
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(registry.EXPERIMENTS, "toy", f"{__name__}:TOY")
    monkeypatch.setattr(recorder, "sources", lambda function: {"a.py::f": "1"})
    CALLS.clear()
    FAILING.clear()


def test_a_record_holds_every_seed_and_where_it_was_made(toy, tmp_path):
    path = record("toy", seeds=3, out=tmp_path)
    found = json.loads(path.read_text("utf-8"))
    assert path.name == "toy.json" and list(tmp_path.iterdir()) == [path]
    assert [run["test"] for run in found["units"]["two"]["runs"]] == [[2.0, None], [2.33333, None], [2.66667, None]]
    assert found["summary"] == {"mean": 11.0} and found["device"] == "CPU" and found["seeds"] == 3
    assert found["versions"]["torch"] == torch.__version__ and found["sources"] == {"a.py::f": "1"}
    assert changed(found) == []


def test_finished_units_are_not_run_again(toy, tmp_path):
    FAILING.add(2)
    with pytest.raises(KeyboardInterrupt):
        record("toy", seeds=2, out=tmp_path)
    FAILING.clear()
    record("toy", seeds=2, out=tmp_path)
    assert [x for x, seeds in CALLS[:3]] == [1, 2, 2]  # then the small runs


def test_what_changed_is_named(toy, tmp_path, monkeypatch):
    found = json.loads(record("toy", seeds=2, out=tmp_path).read_text("utf-8"))
    monkeypatch.setattr(recorder, "sources", lambda function: {"a.py::f": "2", "a.py::g": "1"})
    assert changed(found) == ["a.py::f: changed", "a.py::g: added"]
    found["units"]["one"]["parameters"] = {"x": 5}
    assert "parameters of the unit one: changed" in changed(found)
    found["units"]["one"]["parameters"] = {"x": 1}
    found["summary"]["mean"] = 0
    assert changed(found)[-1].startswith("summary: ")


def test_rewritten_sources_are_accepted_only_with_the_same_numbers(toy, tmp_path, monkeypatch):
    path = record("toy", seeds=2, out=tmp_path)
    monkeypatch.setattr(recorder, "sources", lambda function: {"a.py::f": "2"})
    confirm(path)
    assert changed(json.loads(path.read_text("utf-8"))) == []
    before = path.read_text("utf-8")
    monkeypatch.setattr(recorder, "sources", lambda function: {"a.py::f": "3"})
    monkeypatch.setattr(recorder, "_small", lambda chosen: {"one": [{"test": [1.01, None]}, {"test": [1.34, None]}]})
    with pytest.raises(ValueError, match="other numbers in one"):
        confirm(path)
    assert path.read_text("utf-8") == before
    monkeypatch.undo()
    monkeypatch.setitem(registry.EXPERIMENTS, "toy", f"{__name__}:TOY")
    found = json.loads(before) | {"summary": {"mean": 5.0}, "sources": {}}
    recorder._write(path, found)
    confirm(path)
    assert json.loads(path.read_text("utf-8"))["summary"] == json.loads(before)["summary"]
    found["units"]["one"]["parameters"] = {"x": 5}
    recorder._write(path, found)
    with pytest.raises(ValueError, match="re-run or revert: parameters of the unit one"):
        confirm(path)


def test_workers_share_units_then_seeds():
    assert recorder._jobs(["a", "b"], [0, 1, 2], 2, True) == [("a", [0, 1, 2]), ("b", [0, 1, 2])]
    assert recorder._jobs(["a"], [0, 1, 2], 2, True) == [("a", [0, 2]), ("a", [1])]
    assert recorder._jobs(["a", "b"], [0, 1], 3, False) == [("a", [0]), ("a", [1]), ("b", [0]), ("b", [1])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 1}, "seeds = 1"),
        ({"device": "cuda"}, "device = 'cuda': torch sees no GPU"),
    ],
)
def test_bad_input_names_the_argument(toy, options, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        record("toy", **options)


def test_a_missing_record_is_named_with_the_command_that_makes_it(toy):
    with pytest.raises(FileNotFoundError, match=r"kexue_utils/recorded/toy.json is missing: .*training run toy"):
        load("toy")
    with pytest.raises(ValueError, match="name = 'nothing': it must be one of"):
        load("nothing")


def test_every_experiment_has_a_record_or_is_said_to_wait_for_one():
    recorded = {path.stem for path in RECORDED.glob("*.json")}
    assert recorded | registry.WAITING == set(registry.EXPERIMENTS) and not recorded & registry.WAITING


@pytest.mark.parametrize("name", sorted(set(registry.EXPERIMENTS) - registry.WAITING))
def test_the_sources_of_every_record_are_those_that_made_it(name):
    found = load(name)
    assert not found["smoke"] and found["seeds"] >= 5
    lines = changed(found)
    assert not lines, f"re-run, revert, or `python -m kexue_utils.training confirm {name}`: {lines}"


def test_the_command_line(capsys):
    main(["list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in registry.EXPERIMENTS)
    with pytest.raises(SystemExit):
        main(["run", "nothing"])


def test_progress_is_lines_without_tqdm_and_silent_without_a_description(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(progress(20, "text", start=10)) == list(range(10, 20))
    assert "text: 20/20" in capsys.readouterr().err
    assert list(progress(3, None)) == [0, 1, 2] and capsys.readouterr().err == ""


def test_torchrun_splits_the_work(tmp_path, root):
    command = "from torch.distributed.run import main; import sys; sys.exit(main(sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", command, "--standalone", "--nproc-per-node", "2", "-m", "kexue_utils.training", "run",
         "naive_bayes_lengths", "--smoke", "--seeds", "3", "--out", str(tmp_path)],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "naive_bayes_lengths.smoke.json").read_text("utf-8"))
    assert found["workers"] == 2 and all(len(unit["runs"]) == 3 for unit in found["units"].values())


def test_sources_are_followed_through_imports_and_blind_to_comments(tmp_path, monkeypatch):
    from kexue_utils.training import sources as module

    package = tmp_path / "kexue_utils"
    (package / "part").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "part/__init__.py").write_text("from .inner import f\n")
    (package / "part/inner.py").write_text("LIMIT = 3\ndef f():\n    return LIMIT\ndef unused():\n    return 0\n")
    use = 'from kexue_utils.part import f, inner\ndef run():\n    """Doc."""\n    return {}\n'
    (package / "use.py").write_text(use.format("f()"))
    monkeypatch.setattr(module, "ROOT", package)
    run = type("Function", (), {"__module__": "kexue_utils.use", "__qualname__": "run"})
    first = sources(run)
    assert list(first) == [
        "kexue_utils/part/inner.py::LIMIT",
        "kexue_utils/part/inner.py::f",
        "kexue_utils/use.py::run",
    ]
    (package / "use.py").write_text(use.format("inner.f()  # the same").replace("Doc.", "Another\n\n    text."))
    assert list(sources(run)) == list(first)
    (package / "use.py").write_text(use.format("f()  # a remark").replace("Doc.", "Another."))
    assert sources(run) == first
    (package / "part/inner.py").write_text("LIMIT = 4\ndef f():\n    return LIMIT\n")
    assert {k for k, v in sources(run).items() if v != first[k]} == {"kexue_utils/part/inner.py::LIMIT"}


def test_a_number_changed_by_hand_is_noticed(toy, tmp_path, monkeypatch):
    path = record("toy", seeds=2, out=tmp_path / "recorded")
    monkeypatch.setattr(recorder, "files", lambda package: tmp_path)
    found = load("toy")
    found["units"]["one"]["runs"][0]["test"][0] += 0.25
    recorder._write(path, found)
    with pytest.raises(ValueError, match=r"toy.json is not what its run wrote: restore it, or repeat it"):
        load("toy")
