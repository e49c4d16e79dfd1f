"""Data files and a tokenizer as rows."""

from pathlib import Path
from typing import Any

import pytest

from mlora.sft.objective import Sft
from mlora_tools.data import Dataset, load_data, open_tokenizer
from tests.tools.runs import write_base, write_pairs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_tokenizer(write_base(tmp_path_factory.mktemp("data") / "base"))


def load(tokenizer: Any, *paths: Path, **changes: Any) -> Dataset:
    options = {"seq_length": 24, "packing": False, "vocab_size": 101, **changes}
    return load_data(paths, tokenizer, Sft(), **options)


@pytest.mark.parametrize("packing", [False, True])
def test_tokens_of_a_row_are_its_places_without_padding(tmp_path: Path, tokenizer: Any, packing: bool) -> None:
    data = load(tokenizer, write_pairs(tmp_path / "d.jsonl", 20), packing=packing)
    assert [int((row.segments > 0).sum()) for row in data.rows] == data.tokens[:-1].tolist()
    assert data.tokens[len(data.rows)] == 0
    assert data.facts["tokens"] == data.tokens.sum()
    assert data.facts["targets"] == sum(int(row.loss_mask.sum()) for row in data.rows)
    assert (len(data.rows) < 20) == packing


def test_files_follow_each_other_and_are_recorded(tmp_path: Path, tokenizer: Any) -> None:
    one, two = write_pairs(tmp_path / "1.jsonl", 5), write_pairs(tmp_path / "2.jsonl", 3, first=5)
    both = load(tokenizer, one, two)
    whole = load(tokenizer, write_pairs(tmp_path / "all.jsonl", 8))
    assert both.digest == whole.digest and len(both.rows) == 8
    assert [file["samples"] for file in both.facts["files"]] == [5, 3]
    assert load(tokenizer, two, one).digest != both.digest


def test_the_digest_sees_tokens_targets_and_cuts(tmp_path: Path, tokenizer: Any) -> None:
    def digest(text: str, **changes: Any) -> str:
        path = tmp_path / "d.jsonl"
        path.write_text(text)
        return load(tokenizer, path, **changes).digest

    pair = digest('{"prompt": "ab", "completion": "cd"}\n')
    assert pair == digest('{"completion": "cd", "prompt": "ab", "id": 3}\n\n')
    different = [
        digest('{"prompt": "abc", "completion": "d"}\n'),
        digest('{"text": "abcd"}\n'),
        digest('{"prompt": "ab", "completion": "ce"}\n'),
        digest('{"prompt": "ab", "completion": "cd"}\n', seq_length=3),
    ]
    assert len({pair, *different}) == 5


def test_what_is_cut_and_left_out_is_recorded(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a", "completion": "bcdefgh"}\n{"prompt": "abcdefgh", "completion": "b"}\n')
    facts = load(tokenizer, path, seq_length=4).facts["files"][0]
    assert (facts["records"], facts["samples"], facts["cut"], facts["left_out"]) == (2, 1, 1, 1)


def test_a_tokenizer_of_another_model_is_noticed(tmp_path: Path, tokenizer: Any) -> None:
    path = write_pairs(tmp_path / "d.jsonl", 3)
    with pytest.raises(ValueError, match=r"d\.jsonl: the tokenizer gives token \d+, but the model's vocabulary has 20"):
        load(tokenizer, path, vocab_size=20)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded"):
        open_tokenizer(tmp_path)
