"""PyTorch files against the values that PyTorch 2.13 wrote into them (torch_files/), and what may not be in them."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ernie_kqat import UserError
from ernie_kqat.models.torch_file import read_tensors

FILES = Path(__file__).parent / "torch_files"
DTYPES = {"half": np.float16, "double": np.float64, "ids": np.int64}


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_every_tensor_is_what_pytorch_wrote(name):
    found = read_tensors(FILES / name)
    expected = json.loads((FILES / "expected.json").read_text())
    assert list(found) == list(expected)
    for key, values in expected.items():
        assert found[key].dtype == DTYPES.get(key, np.float32)
        assert found[key].shape == ((0, 3) if key == "empty" else np.shape(values))
        np.testing.assert_array_equal(found[key].astype(np.float64), np.reshape(values, found[key].shape))
        assert found[key].flags.c_contiguous


def test_a_module_is_no_weights():
    with pytest.raises(
        UserError, match=r"module\.bin: .* it asks for torch\.nn\.modules\.linear\.Linear, which no tensor"
    ):
        read_tensors(FILES / "module.bin")


def test_a_nested_checkpoint_is_named():
    with pytest.raises(UserError, match="'model' is a dict; a tensor is needed"):
        read_tensors(FILES / "nested.bin")


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_does_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    path, content = tmp_path / "evil.bin", pickle.dumps({"weight": Malice()})
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("evil/data.pkl", content)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="which no tensor needs"):
        read_tensors(path)
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.97])
def test_a_cut_file(tmp_path, name, share):
    content = (FILES / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=f"{name}: damaged or cut short, or no PyTorch weights"):
        read_tensors(tmp_path / name)


def test_a_tensor_outside_its_storage(tmp_path):
    """The shape (6, 4) of the first tensor is changed to (7, 4): its last row would be memory of others."""
    path = tmp_path / "zip.bin"
    with zipfile.ZipFile(FILES / "zip.bin") as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                before = pickle.BININT1 + b"\x06" + pickle.BININT1 + b"\x04"
                assert content.count(before) == 1
                content = content.replace(before, pickle.BININT1 + b"\x07" + pickle.BININT1 + b"\x04")
            target.writestr(name, content)
    with pytest.raises(UserError, match=r"a tensor of shape \[7, 4\] in a storage of 24 values"):
        read_tensors(path)
