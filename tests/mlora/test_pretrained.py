"""Directories that are whole, and every way in which one is not: an error that names the file and the key."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlora.families import LLAMA
from mlora.pretrained import Pretrained
from tests.tiny import HIDDEN, VOCAB, make_model, write_model

INDEX = "model.safetensors.index.json"
NORM, Q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A model in one file."""
    return write_model(tmp_path / "model", shard_size="1GB")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in several files."""
    return write_model(tmp_path / "model", shard_size="20KB")


def edit_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_what_is_opened(sharded: Path) -> None:
    pretrained = Pretrained.open(str(sharded))
    assert pretrained.path == sharded
    assert pretrained.config["vocab_size"] == VOCAB
    assert pretrained.family is LLAMA
    assert len(list(sharded.glob("*.safetensors"))) > 3


@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
def test_slices_are_those_of_the_tensors(tmp_path: Path, shard_size: str) -> None:
    state = make_model("llama").state_dict()
    path = write_model(tmp_path / "model", shard_size=shard_size)
    with Pretrained.open(path).weights() as weights:
        assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
        assert weights.bytes == sum(4 * tensor.numel() for tensor in state.values())
        assert weights.bytes_read == 0
        assert torch.equal(weights.read(Q, 3, 5, 8, 16), state[Q][3:8, 8:24])
        assert torch.equal(weights.read(Q, 3, 5), state[Q][3:8])
        assert torch.equal(weights.read(NORM, 2, 7), state[NORM][2:9])
        assert weights.bytes_read == 4 * (5 * 16 + 5 * HIDDEN + 7)
        assert weights.where(Q).startswith(str(path))


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json is missing"):
        Pretrained.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no JSON object"),
        ("{}", "model_type = None is not supported"),
        ("\xff", "is no JSON"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"config\.json:? {message}"):
        Pretrained.open(tmp_path)


def test_a_key_that_cannot_be_represented_is_refused_when_opened(single: Path) -> None:
    edit_config(single, hidden_act="relu")
    with pytest.raises(ValueError, match=rf"^{single}/config\.json: hidden_act = 'relu'"):
        Pretrained.open(single)


def refused(path: Path, error: type[Exception], message: str) -> None:
    pretrained = Pretrained.open(path)
    with pytest.raises(error, match=message):
        pretrained.weights()


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, FileNotFoundError, r"has neither model\.safetensors nor model\.safetensors\.index\.json")


def test_a_missing_file(sharded: Path) -> None:
    (sharded / "model-00002-of-00008.safetensors").unlink()
    refused(sharded, FileNotFoundError, r"model-00002-of-00008\.safetensors is missing")


@pytest.mark.parametrize("size", [0, 4, 60, -1, -5000])
def test_a_truncated_file(single: Path, size: int) -> None:
    file = single / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:size])
    refused(single, ValueError, r"model/model\.safetensors cannot be read")


def test_a_header_that_is_none(single: Path) -> None:
    (single / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"oops")
    refused(single, ValueError, r"model/model\.safetensors cannot be read")


def test_a_missing_tensor(single: Path) -> None:
    edit_tensors(single, lambda tensors: tensors.pop(Q))
    refused(single, ValueError, rf"lacks {Q}$")


def test_a_tensor_left_over(single: Path) -> None:
    edit_tensors(single, lambda tensors: tensors.update({"model.layers.4.self_attn.q_proj.weight": torch.zeros(2, 2)}))
    refused(single, ValueError, r"holds model\.layers\.4\.self_attn\.q_proj\.weight, which the model that config\.json")


def test_biases_left_over(single: Path) -> None:
    edit_tensors(
        single, lambda t: t.update({f"model.layers.{n}.self_attn.q_proj.bias": torch.zeros(4) for n in (0, 1)})
    )
    refused(single, ValueError, r"holds model\.layers\.0\.self_attn\.q_proj\.bias and 1 other tensor,")


def test_a_tensor_of_another_shape(single: Path) -> None:
    edit_tensors(single, lambda tensors: tensors.update({Q: tensors[Q].reshape(-1)}))
    refused(single, ValueError, rf"model\.safetensors: {Q} has shape \[1024\]; config\.json asks for \[32, 32\]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_tensor_that_is_no_float(single: Path, dtype: torch.dtype) -> None:
    edit_tensors(single, lambda tensors: tensors.update({Q: tensors[Q].to(dtype)}))
    refused(single, ValueError, rf"model\.safetensors: {Q} is of type .*; only F64, F32, BF16, F16 can be loaded")


@pytest.mark.parametrize("file", ["../model-00001-of-00008.safetensors", "/etc/passwd", "a/b", "..", "", 3, None])
def test_an_index_that_leads_elsewhere(sharded: Path, file: object) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][NORM] = file
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, ValueError, rf"{INDEX}: {NORM} is in {file!r}; only files of the same directory are read")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": null}', "\xff"])
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_bytes(content.encode("latin-1"))
    refused(sharded, ValueError, rf"{INDEX} is no index of safetensors files")


def test_an_index_against_its_files(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    where = index["weight_map"].pop(NORM)
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, ValueError, rf"{where} holds {NORM}, which {INDEX} does not place there")
    index["weight_map"] |= {NORM: where, "more": where}
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, ValueError, rf"{where} lacks more, which {INDEX} places there")


def test_links_are_followed(sharded: Path, tmp_path: Path) -> None:
    """The Hub's cache is made of links."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in sharded.iterdir():
        (snapshot / file.name).symlink_to(file)
    Pretrained.open(snapshot).weights()


def test_a_tied_output_layer_may_be_saved_too(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", "llama-tied", shard_size="1GB")
    edit_tensors(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    Pretrained.open(path).weights()
    edit_tensors(path, lambda tensors: tensors["lm_head.weight"][VOCAB - 1].add_(1))
    refused(path, ValueError, r"lm_head\.weight differs from model\.embed_tokens\.weight.*tie_word_embeddings")
    edit_tensors(path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(VOCAB, 1)}))
    refused(path, ValueError, r"lm_head\.weight has shape")


def test_buffers_of_old_checkpoints_are_ignored(single: Path) -> None:
    edit_tensors(single, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    Pretrained.open(single).weights()
