"""Packed artifacts: matrices at their true bit width, the same bytes and answers again, and no file that harms its reader."""

import hashlib
import json
import shutil
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
import pytest
from artifacts import make_artifact, random_rows
from asking import ask
from running import serve

from ernie_kqat import Predictor, UserError, artifact, config, files, quantizers, strict
from ernie_kqat.config import WeightQuant
from ernie_kqat.export.integers import integers_of
from ernie_kqat.home import home
from ernie_kqat.packed import codes, expand, grid, pack, parameters
from ernie_kqat.quantizers import WeightQuantizer
from ernie_kqat.serving import models

RNG = np.random.default_rng(0)
WEIGHT = (RNG.standard_normal((96, 130)) * np.logspace(-2, 2, 130)).astype(np.float32)
SPLIT = {"quantizer": "binary", "bits": 1, "split": True}
KINDS = {  # options of the quantizer, bits that its values take
    "int8": ({"bits": 8}, 8),
    "int7": ({"bits": 7, "range": "mse"}, 7),
    "int5": ({"bits": 5}, 5),
    "int4": ({"bits": 4, "range": "mse"}, 4),
    "int3": ({"bits": 3}, 3),
    "int2": ({"bits": 2}, 2),
    "lsq4": ({"quantizer": "lsq", "bits": 4}, 4),
    "ternary": ({"quantizer": "ternary", "bits": 2}, 2),
    "binary": ({"quantizer": "binary", "bits": 1}, 1),
    "split": (SPLIT, 2),
}


def deployed(kind, granularity):
    """A weight on its grid, as attach.deployable makes it; a split one has moved since it was split."""
    options = WeightQuant(granularity=granularity, **KINDS[kind][0])
    quantizer = quantizers.find(options.quantizer, WeightQuantizer)(options, paddle.to_tensor(WEIGHT))
    quantizer.begin(paddle.to_tensor(WEIGHT))
    noise = RNG.standard_normal(WEIGHT.shape) * np.abs(WEIGHT).mean(axis=0) / 4 if kind == "split" else 0
    q, step = quantizer.integers(paddle.to_tensor((WEIGHT + noise).astype(np.float32)))
    return q.astype(np.float32) * step


def same_bits(first, second):
    np.testing.assert_array_equal(first.view(np.uint32), second.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("granularity", "group"), [("tensor", "matrix"), ("channel", "column"), ("row", "row")])
def test_every_quantizers_weight_has_its_bits_and_comes_back_exactly(kind, granularity, group):
    matrix = deployed(kind, "channel" if granularity == "row" else granularity)
    matrix = np.ascontiguousarray(matrix.T) if granularity == "row" else matrix  # as of an embedding table
    coded = codes.encode(matrix)
    assert coded is not None
    assert (coded.group, coded.bits) == (group, KINDS[kind][1])
    assert len(coded.indices) == (matrix.size * coded.bits + 7) // 8
    assert len(coded.step) == {"matrix": 1, "column": matrix.shape[1], "row": matrix.shape[0]}[group]
    same_bits(codes.decode(coded), matrix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_int8_matrices_take_as_few_bits(kind, granularity):
    q, _ = integers_of(deployed(kind, granularity))
    coded = codes.encode(q)
    assert coded.bits == KINDS[kind][1]
    np.testing.assert_array_equal(codes.decode(coded), q)


def test_bits_are_written_from_the_lowest_up():
    """Against one large Python integer: value i stands at bits i * width."""
    for bits in range(1, 9):
        index = RNG.integers(0, 2**bits, 77).astype(np.uint8)
        number = sum(int(value) << (bits * place) for place, value in enumerate(index))
        expected = number.to_bytes((bits * 77 + 7) // 8, "little")
        assert codes.pack_bits(index, bits) == expected
        np.testing.assert_array_equal(codes.unpack_bits(expected, bits, 77), index)
        with pytest.raises(ValueError, match="77 values of"):
            codes.unpack_bits(expected[:-1], bits, 77)


@pytest.mark.parametrize("step", [1.0, 0.1, 3e-20, 0.9999999, 1.0000001, 7e18])
def test_integers_and_steps_are_found_from_values_alone(step):
    q = RNG.integers(-127, 128, (7, 60))
    q[0] = 0
    q[1] = np.where(q[1] > 0, 126, 84)  # no value is the step, and none a multiple of the smallest
    q[2] = np.where(q[2] > 0, 5, -5)
    q[3, :-1], q[3, -1] = 126, 127
    groups = q.astype(np.float32) * np.float32(step)
    found, steps = grid.recover(groups)
    same_bits(found.astype(np.float32) * steps[:, None], groups)
    assert np.abs(found[2]).max() == 1
    assert (steps > 0).all()


@pytest.mark.parametrize("value", [0.3, np.nan, np.inf, -0.0, 1e-30, 128.0])
def test_one_value_off_the_grid_keeps_a_matrix_as_it_is(value):
    matrix = RNG.integers(-127, 128, (40, 30)).astype(np.float32)
    matrix[0], matrix[1], matrix[:, 0], matrix[:, 1] = 1, 127, 1, 127
    assert codes.encode(matrix).bits == 8
    matrix[5, 5] = value
    assert codes.encode(matrix) is None
    assert codes.encode(WEIGHT) is None
    assert codes.encode(np.zeros((0, 4), np.float32)) is None


def test_a_float_grid_that_is_nearly_one_is_none():
    """One value is one unit in the last place beside its grid point."""
    matrix = deployed("int8", "tensor")
    place = np.unravel_index(np.abs(matrix).argmax(), matrix.shape)
    matrix[place] = np.nextafter(matrix[place], np.float32(0))
    coded = codes.encode(matrix)
    assert coded is None or np.array_equal(codes.decode(coded), matrix)
    assert coded is None or coded.group != "matrix"


def test_an_index_without_a_level_is_refused():
    coded = codes.encode(deployed("ternary", "tensor"))
    bad = codes.Coded(coded.shape, coded.group, coded.bits, b"\xff" * len(coded.indices), coded.levels, coded.step)
    with pytest.raises(ValueError, match="index 3 where there are 3 levels"):
        codes.decode(bad)


def proportions(share, kind, weight_kind):
    """MiniLM's matrices, a sixth of each kind: one layer of six, so many rows of the embeddings."""
    rng = np.random.default_rng(1)

    def on_grid(rows, columns, axis, bits):
        weight = rng.standard_normal((rows, columns)).astype(np.float32)
        if bits == 1:
            step = np.abs(weight).mean(axis=axis, keepdims=True)
            return np.where(weight < 0, np.float32(-1), np.float32(1)) * step
        step = np.abs(weight).max(axis=axis, keepdims=True) / np.float32(127)
        return (np.rint(weight / step) + np.float32(0)) * step  # no -0.0, as from integers

    square, wide, tall = (384, 384), (384, 1536), (1536, 384)
    return [
        on_grid(30522 // share, 384, 1, kind),
        on_grid(512 // share, 384, 1, 8),
        *(on_grid(*shape, 0, weight_kind) for shape in (square, square, square, square, wide, tall)),
    ], rng.standard_normal(4992).astype(np.float32)  # biases and LayerNorms of a layer


@pytest.mark.parametrize(("bits", "least"), [(8, 3.9), (1, 27.0)])
def test_size_of_minilm(bits, least):
    matrices, others = proportions(6, bits, bits)
    coded = [codes.encode(matrix) for matrix in matrices]
    assert [code.bits for code in coded] == [bits, 8, *[bits] * 6]
    packed = sum(codes.size_bytes(code) for code in coded) + others.nbytes
    fp32 = sum(matrix.nbytes for matrix in matrices) + others.nbytes
    assert fp32 / packed > least


# --- Paddle's file of parameters ---


def test_paddles_parameters_are_read_and_written_as_they_are(tiny_int8):
    content = (tiny_int8 / artifact.PARAMS).read_bytes()
    tensors = parameters.read(content)
    assert parameters.write(tensors) == content
    assert {(one.type, len(one.data) // int(np.prod(one.shape))) for one in tensors} == {(5, 4), (21, 1)}
    large = parameters.Parameter(21, (300, 1, 70000), b"")
    assert parameters.write([large])[20:28] == bytes([0x08, 21, 0x10, 0xAC, 0x02, 0x10, 0x01, 0x10])
    assert parameters.read(parameters.write([parameters.Parameter(3, (), b"12345678")]))[0].shape == ()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "bytes of values, of which"),
        (lambda data: data[:10], "not a dense tensor of version 0"),
        (lambda data: b"\x01" + data[1:], "not a dense tensor of version 0"),
        (lambda data: data[:20] + b"\x18" + data[21:], "unknown field, tag 24"),
        (lambda data: data[:21] + b"\x63" + data[22:], "its type \\[99\\] is not one of"),
        (lambda data: data[:16] + struct.pack("<i", -5) + data[20:], "its type \\[\\]"),
        (lambda data: data[:16] + struct.pack("<i", 2) + b"\x08\x85" + data[22:], "its description is cut"),
    ],
)
def test_other_files_are_no_parameters(tiny_int8, damage, message):
    with pytest.raises(ValueError, match=message):
        parameters.read(damage((tiny_int8 / artifact.PARAMS).read_bytes()))


# --- The packed file ---

QUANTS = {
    "int8": ({"embedding": {"tables": [["position|token_type", {}]]}}, {8}),
    "int8 per tensor": ({"weight": {"granularity": "tensor"}, "embedding": {"granularity": "tensor"}}, {8}),
    "int4": ({"weight": {"bits": 4, "range": "mse"}, "embedding": {"bits": 3}}, {3, 4}),
    "ternary": ({"weight": KINDS["ternary"][0], "embedding": KINDS["ternary"][0]}, {2}),
    "binary": ({"weight": KINDS["binary"][0], "embedding": KINDS["binary"][0]}, {1}),
    "split": ({"weight": {**SPLIT, "granularity": "tensor"}, "embedding": SPLIT}, {2}),
}


def quant(tree):
    return strict.build(config.Quant, tree, "quant", "test")


@pytest.mark.parametrize("kind", QUANTS)
def test_a_packed_artifact_answers_the_same_in_every_bit(tmp_path, tiny_ernie, kind):
    tree, bits = QUANTS[kind]
    folder = make_artifact(tmp_path / "a", tiny_ernie, quant=quant(tree))
    summary = pack.pack(folder, tmp_path / "a.kqat")
    large = {row["bits"] for row in summary["matrices"] if row["values"] / row["matrices"] > 500}
    assert large <= bits | ({8} if kind == "int8" else set())
    assert summary["size_bytes"] == (tmp_path / "a.kqat").stat().st_size
    assert summary["size_ratio"] == summary["fp32_size_bytes"] / summary["size_bytes"]
    packed, plain = Predictor(tmp_path / "a.kqat"), Predictor(folder)
    rows = random_rows(40, packed.manifest["vocab_size"])
    np.testing.assert_array_equal(packed.logits(rows), plain.logits(rows))
    assert packed.predict(["a good film"]) == plain.predict(["a good film"])


def test_an_artifact_with_a_native_program_is_packed_whole(tiny_int8, tmp_path):
    folder = Path(shutil.copytree(tiny_int8, tmp_path / "both"))
    (folder / artifact.NATIVE).mkdir()
    (folder / artifact.NATIVE / artifact.PARAMS).write_bytes(b"its parameters")
    fields = {key: value for key, value in artifact.read_manifest(folder).items() if key not in ("format", "files")}
    names = [name for name in artifact.contents(folder) if name != artifact.MANIFEST]
    artifact.write_manifest(folder, {**fields, artifact.NATIVE: {"output": "logits"}}, names)
    pack.pack(folder, tmp_path / "both.kqat")
    found = expand.folder_of(tmp_path / "both.kqat")
    assert sorted(artifact.contents(found)) == sorted(artifact.contents(folder))
    assert (found / artifact.NATIVE / artifact.PARAMS).read_bytes() == b"its parameters"


@pytest.fixture(scope="module")
def packed(tiny_int8, tmp_path_factory):
    """The tiny INT8 artifact, packed; read only."""
    path = tmp_path_factory.mktemp("packed") / "tiny.kqat"
    pack.pack(tiny_int8, path)
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_expands_to_the_same_files_and_packs_to_the_same_file(packed, tiny_int8, tiny_fp32, tmp_path):
    expand.expand(packed, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tiny_int8)
    pack.pack(tmp_path / "again", tmp_path / "again.kqat")
    assert (tmp_path / "again.kqat").read_bytes() == packed.read_bytes()
    assert pack.pack(tiny_fp32, tmp_path / "again.kqat")["matrices"] == []  # an fp32 artifact is kept as it is


def test_it_is_expanded_once_and_by_one_of_many(packed, monkeypatch):
    with ThreadPoolExecutor(4) as threads:
        folders = set(threads.map(expand.folder_of, [packed] * 4))
    (folder,) = folders
    assert folder.parent == home() / "expanded"
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    monkeypatch.setattr(expand, "expand_content", None)  # not needed again
    assert expand.folder_of(packed) == folder
    assert expand.folder_of(folder) == folder


def test_it_is_served_under_the_version_of_its_folder(packed, tiny_int8):
    (from_file,), (from_folder,) = (models.load({"a": path}) for path in (packed, tiny_int8))
    assert from_file.version == from_folder.version
    assert from_file.folder == expand.folder_of(packed).resolve()


def test_an_artifact_that_was_not_verified_stays_so(tmp_path, tiny_ernie):
    pack.pack(make_artifact(tmp_path / "a", tiny_ernie, "fp32", verification=None), tmp_path / "a.kqat")
    with pytest.raises(UserError, match="it was never verified"):
        Predictor(tmp_path / "a.kqat")


def parts_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path, target, change, listed=True):
    """A copy of a packed file with changed parts; `listed`: with their true sizes and hashes in packed.json."""
    parts = parts_of(path)
    index = json.loads(parts["packed.json"])
    change(parts, index)
    if listed:
        index["parts"] = {
            name: {"size_bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()}
            for name, part in parts.items()
            if name != "packed.json"
        }
    if "packed.json" in parts:
        parts["packed.json"] = json.dumps(index).encode()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return target


def set_index(**changes):
    return lambda parts, index: index.update(changes)


def set_grid(**changes):
    def change(parts, index):
        next(one for one in index["parameters"] if one["grid"])["grid"].update(changes)

    return change


def set_part(name, part):
    return lambda parts, index: parts.update({name: part(parts.get(name)) if callable(part) else part})


def drop(name):
    return lambda parts, index: parts.pop(name)


def set_shape(*shape):
    return lambda parts, index: index["parameters"][0].update(shape=list(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_index(version=2), "version 2; this version reads 'ernie_kqat packed artifact', version 1"),
        (set_index(format="other"), "'other', version 1; this version reads"),
        (set_index(parameters=None), "it lists no parameters"),
        (set_index(parameters=[]), "more than the parameters take"),
        (set_index(parameters=[3]), "its parameters cannot be read"),
        (set_part("files/a.exe", b""), "holds a.exe, which its manifest.json does not list"),
        (set_part("files/../a", b""), "unknown part 'files/../a'"),
        (set_part("files/.a", b""), "unknown part 'files/.a'"),
        (set_part("files/other/a", b""), "unknown part 'files/other/a'"),
        (set_part("files/native/../../a", b""), "unknown part"),
        (set_part("files/native/a", b""), "holds native/a, which its manifest.json does not list"),
        (set_part("/tmp/a", b""), "unknown part '/tmp/a'"),
        (set_part("parameters/more", b""), "unknown part 'parameters/more'"),
        (drop("files/vocab.txt"), "vocab.txt: listed in manifest.json but missing"),
        (drop("parameters/steps"), "its parameters cannot be read: 'parameters/steps'"),
        (drop("packed.json"), "a zip without packed.json: not a packed artifact"),
        (set_part("parameters/steps", lambda part: struct.pack("<f", 1e9) + part[4:]), "values beyond int8"),
        (set_part("parameters/steps", lambda part: part[:-4]), "4 bytes of steps, of which|of steps, of which"),
        (set_part("parameters/values", lambda part: part + b"1"), "values: more than the parameters take"),
        (set_part("parameters/values", lambda part: part[:-1] + b"1"), "its sha256 is not the one in manifest.json"),
        (set_part("files/vocab.txt", b"a"), "1 bytes, where manifest.json says"),
        (set_part("files/manifest.json", b"{}"), "format None; this version reads format 1"),
        (set_grid(bits=9), "9 is not a whole number in 1..8"),
        (set_grid(bits=True), "True is not a whole number"),
        (set_grid(group="layer"), "a step for each layer"),
        (set_grid(group="column", levels=[7, 2]), "levels of 7 groups, where there are 32"),
        (set_grid(levels=[1, 2]), "levels"),
        (set_shape(1 << 40, 3), "is not a whole number in 0.."),
        (set_shape(1 << 31, 1 << 31), "over 4294967296 bytes of parameters"),
        (set_shape(*[1] * 9), "9 is not a whole number in 0..8"),
        (set_shape(-1), "-1 is not a whole number"),
    ],
)
def test_a_changed_file_is_refused_in_one_sentence(packed, tmp_path, change, message):
    bad = rewritten(packed, tmp_path / "bad.kqat", change)
    with pytest.raises(UserError, match=message) as error:
        Predictor(bad)
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)
    folder = home() / "expanded" / files.sha256(bad)[: expand.KEY_DIGITS]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_part("files/vocab.txt", lambda part: b"X" + part[1:]), "files/vocab.txt: its sha256 is not the one"),
        (set_part("files/vocab.txt", b"X"), "files/vocab.txt: 1 bytes; packed.json says"),
        (set_part("files/more", b""), "its parts are not those that packed.json lists: files/more"),
        (drop("files/vocab.txt"), "its parts are not those that packed.json lists: files/vocab.txt"),
        (set_index(parts={"a": {}}), "it does not list the size and sha256 of each part"),
        (set_index(parts=[]), "it does not list the size and sha256 of each part"),
    ],
)
def test_parts_that_are_not_as_listed_are_refused(packed, tmp_path, change, message):
    bad = rewritten(packed, tmp_path / "bad.kqat", change, listed=False)
    with pytest.raises(UserError, match=message):
        expand.expand(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cut_or_flipped_file_is_refused_or_reads_the_same(packed, tiny_int8):
    content = packed.read_bytes()
    whole = expand.read(content, "whole")
    with zipfile.ZipFile(packed) as archive:
        directory = archive.start_dir
    rng = np.random.default_rng(0)
    # zipfile trusts its directory, and seeks where it says
    places = [*rng.integers(0, len(content), 150), *rng.integers(directory, len(content), 150)]
    damaged = [content[:size] for size in (0, 1, len(content) // 2, len(content) - 1)]
    damaged += [content[:place] + rng.bytes(1) + content[place + 1 :] for place in places]
    refused = 0
    for one in damaged:
        try:
            assert expand.read(one, "damaged") == whole  # a byte that says nothing, as of a date
        except UserError:
            refused += 1
    assert refused > len(damaged) * 0.6


def test_a_bomb_is_refused_before_it_is_read(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(expand, "LIMIT_BYTES", 1 << 20)
    bomb = rewritten(packed, tmp_path / "bomb.kqat", set_part("files/zeros", bytes(1 << 21)))
    monkeypatch.setattr(zipfile.ZipFile, "read", _only_index)
    with pytest.raises(UserError, match="bytes of parts; at most 1048576 are read"):
        expand.expand(bomb, tmp_path / "out")


def _only_index(archive, name):
    assert name == "packed.json"
    with archive.open(name) as file:
        return file.read()


def test_what_is_no_packed_artifact_is_said(tmp_path):
    (tmp_path / "text").write_text("not a zip")
    with pytest.raises(UserError, match=r"text: no packed artifact, or damaged or cut: File is not a zip file"):
        Predictor(tmp_path / "text")


def test_packing_refuses_what_it_cannot_write(packed, tiny_int8, tiny_ernie, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.txt: exists and is no packed artifact"):
        pack.pack(tiny_int8, tmp_path / "mine.txt")
    with pytest.raises(UserError, match="not an artifact"):
        pack.pack(tiny_ernie, tmp_path / "a.kqat")
    copy = Path(shutil.copytree(tiny_int8, tmp_path / "copy"))
    content = bytearray((copy / artifact.PARAMS).read_bytes())
    content[0] = 7
    (copy / artifact.PARAMS).write_bytes(content)
    manifest = json.loads((copy / artifact.MANIFEST).read_text())
    artifact.write_manifest(copy, manifest, manifest["files"])
    with pytest.raises(UserError, match=r"inference\.pdiparams: tensor 0 at byte 0: not a dense tensor of version 0"):
        pack.pack(copy, tmp_path / "a.kqat")
    assert not (tmp_path / "a.kqat").exists()


def test_a_packer_that_loses_a_bit_finds_it_out(tiny_int8, tmp_path, monkeypatch):
    whole = codes.unpack_bits

    def wrong(data, bits, count):
        index = whole(data, bits, count).copy()
        index[count // 2] ^= 1
        return index

    monkeypatch.setattr(codes, "unpack_bits", wrong)
    with pytest.raises((RuntimeError, UserError)):
        pack.pack(tiny_int8, tmp_path / "a.kqat")
    assert not (tmp_path / "a.kqat").exists()


def test_the_tools_take_it(tool, packed, tiny_int8, tiny_task, tmp_path):
    code, out, _ = tool("pack", "--model", tiny_int8, "--output", tmp_path / "a.kqat")
    assert code == 0
    assert "size_ratio: " in out
    answers = [tool("infer", "--model", path, "--logits", "a good film") for path in (tmp_path / "a.kqat", tiny_int8)]
    assert answers[0][:2] == answers[1][:2]
    code, out, _ = tool("eval", "--model", tmp_path / "a.kqat", "--data", tiny_task)
    assert (code, json.loads(out)["kind"]) == (0, "artifact")
    code, out, _ = tool("pack", "--model", tmp_path / "a.kqat", "--output", tmp_path / "folder")
    assert code == 0
    assert contents(tmp_path / "folder") == contents(tiny_int8)
    code, _, err = tool("pack", "--model", tmp_path / "a.kqat", "--output", tiny_task)
    assert code == 2
    assert "exists and is no artifact" in err


def test_it_is_served(packed, tiny_int8):
    texts = ["a good film", "a very dull plot"]
    with serve(packed) as running:
        _, _, value = ask(running.http, {"texts": texts, "logits": True})
    expected = [one.logits for one in Predictor(tiny_int8).predict(texts)]
    np.testing.assert_allclose([row["logits"] for row in value["predictions"]], expected, atol=1e-5)
