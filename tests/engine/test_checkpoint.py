"""Built checkpoints: whole and pinned, and refused when they are damaged."""

import json
from pathlib import Path

import pytest

from quantgate.errors import BadInput
from quantgate.subject import checkpoint as ck
from quantgate.subject import checkpoint_file, files


def test_the_embedded_checkpoint_is_whole_and_pinned(root: Path) -> None:
    for checkpoint in checkpoint_file.read_checkpoint_files(root).values():
        checkpoint_file.verify(checkpoint)
        assert checkpoint.revision == f"sha256:{files.identity(checkpoint.directory)}"


def gated(directory: Path, scheme: str | None = "W4A16") -> ck.Checkpoint:
    return ck.Checkpoint("x", str(directory), scheme=scheme)


def refused(checkpoint: ck.Checkpoint) -> str:
    with pytest.raises(BadInput) as error:
        checkpoint_file.verify(checkpoint)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path}/gone: no such directory" in refused(gated(tmp_path / "gone"))


def test_a_directory_without_quantization_config_is_refused(root: Path) -> None:
    message = refused(gated(root / "fixtures" / "tiny" / "llama", None))
    assert "config.json: no quantization_config" in message


def test_a_scheme_that_config_json_contradicts_is_refused(quantized: Path) -> None:
    message = refused(gated(quantized, "W8A16"))
    assert "scheme is 'W8A16'" in message
    assert "config.json says 'W4A16'" in message


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_damaged_weights_are_refused(quantized_copy: Path, damage: str) -> None:
    path = quantized_copy / "model.safetensors"
    whole = path.read_bytes()
    damaged = {"truncated": whole[:-1], "header": b"\xff" * 16 + whole[16:], "empty": b""}
    path.write_bytes(damaged[damage])
    message = refused(gated(quantized_copy))
    assert f"{path}: truncated or corrupt" in message
    assert "fetch or build it again" in message


def test_a_shard_that_the_index_names_and_nobody_has_is_refused(quantized_copy: Path) -> None:
    index = {"weight_map": {"model.layers.9.mlp.down_proj.weight_packed": "model-2.safetensors"}}
    (quantized_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names 1 tensors that no shard holds" in refused(gated(quantized_copy))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused(quantized_copy: Path, name: str) -> None:
    (quantized_copy / "model.safetensors").rename(quantized_copy / name)
    message = refused(gated(quantized_copy))
    assert f"{name}: pickled weights can run code and are never loaded" in message


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not a JSON file"), ("[]", "holds a list"), (None, "missing")]
)
def test_a_broken_config_is_refused(quantized_copy: Path, text: str | None, message: str) -> None:
    path = quantized_copy / "config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert message in refused(gated(quantized_copy))


def test_one_changed_byte_is_another_identity(quantized_copy: Path, quantized: Path) -> None:
    assert files.identity(quantized_copy) == files.identity(quantized)
    path = quantized_copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert files.identity(quantized_copy) != files.identity(quantized)
    pinned = ck.Checkpoint(
        "x", str(quantized_copy), scheme="W4A16", revision=f"sha256:{files.identity(quantized)}"
    )
    assert "its identity is sha256:" in refused(pinned)


def test_the_same_recipe_gives_the_same_bytes(root: Path, tmp_path: Path, quantized: Path) -> None:
    from tiny.quantizing import build
    from tiny.recipes import RECIPES

    target = tmp_path / "again"
    build(root / "fixtures" / "tiny" / "llama", target, RECIPES["tiny-llama-w4a16"])
    assert files.identity(target) == files.identity(quantized)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]
