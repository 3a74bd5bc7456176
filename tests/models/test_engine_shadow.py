"""The memory that an engine's owner writes and its workers read, without vLLM."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import engine_shadow
from models.engine_shadow import Shadow, mapped_for_reading
from models.engine_weights import ExpectedWeights, expected_weights
from tests.tiny import build_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("shadow") / "model", tied=True)


def shadow_of(model: Path, path: Path, dtype: str = "bfloat16") -> Shadow:
    return Shadow.create(path, expected_weights(str(model), dtype), str(model))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_it_begins_with_the_models_weights_and_readers_see_what_is_written(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    shadow = shadow_of(folder, tmp_path / "shadow")
    reader = mapped_for_reading(tmp_path / "shadow")
    shadow.remove_name()
    assert not list(tmp_path.iterdir())
    assert_same(dict(shadow.tensors), weights)
    assert_same(reader, weights)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in shadow.tensors.values())
    shadow.tensors["model.norm.weight"][3] = 7.5
    weights["model.norm.weight"][3] = 7.5
    assert_same(reader, weights)


def test_the_engines_dtype_counts(folder: Path, tmp_path: Path) -> None:
    tensors = shadow_of(folder, tmp_path / "shadow", "float32").tensors
    assert_same(dict(tensors), {k: v.float() for k, v in load_file(folder / "model.safetensors").items()})


def test_odd_sizes_do_not_overlap(tmp_path: Path) -> None:
    weights = {"a": torch.arange(3).half(), "b": torch.tensor(2.5).half(), "c": torch.zeros(0, 4).half()}
    weights["d"] = torch.arange(35).half().view(5, 7)
    save_file(weights, tmp_path / "model.safetensors")
    expected = ExpectedWeights({k: tuple(v.shape) for k, v in weights.items()}, frozenset(), torch.float16)
    shadow = Shadow.create(tmp_path / "shadow", expected, str(tmp_path))
    assert_same(dict(shadow.tensors), weights)
    assert_same(mapped_for_reading(tmp_path / "shadow"), weights)


def test_only_the_files_that_an_index_names_are_read(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    half = len(weights) // 2
    parts = {"a.safetensors": dict(list(weights.items())[:half]), "c.safetensors": dict(list(weights.items())[half:])}
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    save_file({k: torch.zeros_like(v) for k, v in weights.items()}, tmp_path / "b.safetensors")
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(dict(shadow_of(tmp_path, tmp_path / "shadow").tensors), weights)


def test_names_of_an_older_kind_are_translated_by_transformers(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    old = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(dict(shadow_of(tmp_path, tmp_path / "shadow").tensors), weights)


def test_a_model_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    expected = expected_weights(str(folder), "bfloat16")
    other = ExpectedWeights({**expected.shapes, "model.stranger.weight": (3,)}, frozenset(), torch.bfloat16)
    with pytest.raises(ValueError, match=r"no weight model\.stranger\.weight of shape \(3,\)"):
        Shadow.create(tmp_path / "shadow", other, str(folder))
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_said_at_the_start(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(engine_shadow.os, "posix_fallocate", full)
    with pytest.raises(RuntimeError, match=r"no room for 1 MiB.*--shm-size"):
        shadow_of(folder, tmp_path / "shadow")
    assert not list(tmp_path.iterdir())


def test_a_reader_cannot_write(folder: Path, tmp_path: Path) -> None:
    """It dies, instead of answering with weights that nobody sent."""
    shadow_of(folder, tmp_path / "shadow")
    code = (
        "import sys; from pathlib import Path; from models.engine_shadow import mapped_for_reading; "
        "mapped_for_reading(Path(sys.argv[1]))['model.norm.weight'].zero_()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "shadow")], env=environment, timeout=120)
    assert ended.returncode == -signal.SIGSEGV
