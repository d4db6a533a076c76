import numpy as np
import pytest

from kexue_utils.training.corpora import (
    deal_blocks,
    encode_common,
    pydoc_topics,
    python_sources,
    split_files,
    standard_library,
)


def test_the_help_topics_are_the_known_ones_and_carry_their_licence(root):
    text = pydoc_topics()
    assert len(text) == 465_048 and text.startswith('The "assert" statement')
    file = (root / "kexue_utils/training/data/pydoc_topics.json").read_text("utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in file and "All Rights Reserved" in file


def test_sources_of_another_version_are_refused():
    assert sum(map(len, python_sources().values())) == 26_168_818
    with pytest.raises(ValueError, match="the sources of 'mpmath': SHA-256 is .* install the pinned version"):
        python_sources("mpmath")
    with pytest.raises(ModuleNotFoundError, match="package = 'no_such_package'"):
        python_sources("no_such_package")


def test_ids_follow_frequency():
    ids, characters = encode_common("aAAbbc d", size=4)
    assert characters == ["a", "b", " "] and ids.tolist() == [0, 0, 0, 1, 1, 3, 2, 3] and ids.dtype == np.int64


def test_blocks_are_dealt_to_one_side_each_and_differ_between_seeds():
    data = np.arange(103, dtype=np.uint8)
    parts = deal_blocks(data, 0, held_out=2, size=5)
    assert [len(part) for part in parts] == [80, 10, 10]
    assert sorted(np.concatenate(parts)) == list(range(100))
    assert (
        deal_blocks(data.tobytes(), 0, 2, 5)[2].tolist() == parts[2].tolist() != deal_blocks(data, 1, 2, 5)[2].tolist()
    )
    with pytest.raises(ValueError, match="held_out = 10"):
        deal_blocks(data, 0, held_out=10, size=5)


def test_the_standard_library_is_itself_without_its_tests():
    texts, provenance = standard_library()
    assert texts["this.py"].startswith(b"s = ") and list(texts) == sorted(texts)
    assert not any("test" in name.split("/") or "site-packages" in name for name in texts)
    assert provenance["files"] == len(texts) > 300 and provenance["bytes"] == sum(map(len, texts.values()))
    assert provenance["sha256"] == standard_library()[1]["sha256"]


def test_a_file_is_in_one_split_whatever_the_others_are():
    texts = {f"{i}.py": b"x" for i in range(400)}
    parts = split_files(texts, 0.2)
    assert sorted(name for part in parts for name in part) == sorted(texts)
    assert [len(part) for part in parts] == pytest.approx([240, 80, 80], abs=25)
    some = dict(list(texts.items())[:100])
    for part, fewer in zip(parts, split_files(some, 0.2), strict=True):
        assert fewer.keys() == part.keys() & some.keys()
    with pytest.raises(ValueError, match=r"held_out = 0.5: it must be positive and below a half"):
        split_files(texts, 0.5)
