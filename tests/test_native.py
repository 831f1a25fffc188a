"""The native operator: the simulation's numbers with every instruction set, shape and thread; absent, the plain program."""

import ctypes
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import native_core
import numpy as np
import paddle
import pytest
from artifacts import MAX_LENGTH, make_artifact, random_rows
from asking import ask
from native_core import Core, batch_of
from running import serve
from test_program import calibrated
from tiny_ernie import make_tiny_ernie

from ernie_kqat import KurtosisQAT, Predictor, UserError, artifact, config, native
from ernie_kqat.export import exporter
from ernie_kqat.export import native as export_native
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.packed.pack import pack
from ernie_kqat.quantizers.attach import add_smoothing, deployable, input_of, quantized_linears, smooth
from ernie_kqat.serving import models

COMPILER = os.environ.get("CXX", "g++")
pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler here")


@pytest.fixture(scope="module", autouse=True)
def operator(native_library):
    if not native.why_not():
        native.load()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Call it for the library under sanitizers, with AMX's tiles in memory or the CPU's own."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")

    @functools.cache
    def built(tiles_in_memory: bool) -> Path:
        folder = tmp_path_factory.mktemp("sanitized")
        return native_core.build(folder, COMPILER, *flags, tiles_in_memory=tiles_in_memory)

    return built


needs_fast = pytest.mark.skipif(
    not {"avx512_vnni"} <= set(Path("/proc/cpuinfo").read_text().split()), reason="no AVX-512 with VNNI in this CPU"
)


def quantized(folder, options=None, smoothed=False, **shape):
    """A calibrated tiny ERNIE in eval mode; `smoothed`: every Linear but attention's last, by factors of its own input."""
    model = load_classifier(str(make_tiny_ernie(folder, **shape)), shape.get("num_labels", 2))
    KurtosisQAT(options or {}).quantize(model)
    model.eval()
    for name, layer in quantized_linears(model).items() if smoothed else ():
        if not name.endswith("out_proj"):
            add_smoothing(layer)
            seed = len(input_of(name)) + layer.weight.shape[0]
            smooth(layer, np.random.default_rng(seed).uniform(0.7, 1.4, layer.weight.shape[0]).astype(np.float32))
    ids, types = batch_of(random_rows(16, model.config.vocab_size, seed=1))
    return calibrated(model, paddle.to_tensor(ids), paddle.to_tensor(types))


def case_of(model):
    held = export_native.contents(model)
    settings = {name: np.array(getattr(held, name)) for name in native_core.SETTINGS}
    return {**settings, **held.flat()}


def simulated(model, ids, types):
    with paddle.no_grad():
        return model(paddle.to_tensor(ids), paddle.to_tensor(types)).numpy()


def close(found, expected, spread=None):
    """Float rounding only, but for the rare activation that it moves across the border between two integers.

    spread: the logits' std, where it is not `expected`'s.
    """
    difference = np.abs(found - expected).max(axis=1) / (expected.std() if spread is None else spread)
    return np.median(difference) < 1e-5 and difference.max() < 0.15 and (difference > 1e-4).mean() < 0.3


SHAPES = {
    "plain": {},
    "relu, three labels, one layer": {"hidden_act": "relu", "num_labels": 3, "layers": 1},
    "task type": {"use_task_id": True, "task_id": 1},
    "odd head width, odd hidden": {"hidden": 60, "heads": 6, "intermediate": 100},
    "wide heads": {"hidden": 144, "heads": 3, "intermediate": 320, "layers": 3},
    "products in three parts": {"intermediate": 1600, "layers": 1},
}
LSQ_PLUS = {"quantizer": "lsq", "offset": True, "calibration_batches": 1}
OPTIONS = {
    "4 bits": {"weight_bits": 4, "activation_bits": 4},
    "float Linears": {"layers": [["linear2|classifier|layers.0.self_attn.[qo]", "skip"]]},
    "all float but one": {"layers": [["linear1", {}], [".", "skip"]]},
    "own range for keys": {"layers": [["k_proj", {"activation": {"bits": 7}}]]},
    "offsets": {"layers": [[".", {"activation": LSQ_PLUS}]]},
}
SMOOTHED = {"smoothed": {}, "smoothed, odd widths": SHAPES["odd head width, odd hidden"]}


@pytest.mark.parametrize("name", [*SHAPES, *OPTIONS, *SMOOTHED])
def test_every_instruction_set_computes_the_simulation(core, tmp_path, name):
    shape = {**SHAPES, **SMOOTHED}.get(name, {})
    model = quantized(tmp_path / "m", OPTIONS.get(name), name in SMOOTHED, **shape)
    encoder = Core(core, case_of(model))
    ids, types = batch_of(random_rows(40, model.config.vocab_size, seed=2))
    expected = simulated(model, ids, types)
    for isa in encoder.isas:
        assert close(encoder.logits(ids, types, isa), expected), isa
        assert close(encoder.logits(ids[:1], types[:1], isa, threads=2), expected[:1], expected.std()), isa
    if "amx" in encoder.isas:
        short = ids[:, :63], types[:, :63]  # longer inputs' attention is as exact, but not the same to the last bit
        np.testing.assert_array_equal(encoder.logits(*short, "amx"), encoder.logits(*short, "avx512"))


def test_an_offset_is_exact_in_integers(tmp_path):
    """What the classifier's numbers give in float64: a bias that held all of the offset would be off by its last digit."""
    model = quantized(tmp_path, OPTIONS["offsets"], hidden=64)
    activation = model.classifier._fake_quant_input
    activation.lsq_lowest.set_value(np.float32([-0.01]))  # far from the middle of the range
    held = export_native.contents(model)
    q, weight_step = model.classifier._fake_quant_weight.integers(model.classifier.weight)
    classes = q.shape[1]
    bytes_ = np.random.default_rng(0).integers(0, 3, (100, len(q)))  # near zero
    sums = bytes_ @ q.astype(np.int64) - held.shifts[-1][:classes]
    found = sums * held.floats[-2][:classes].astype(np.float64) + held.floats[-1][:classes]
    inputs = (bytes_ - 128) * float(activation.step()) + activation.offset()
    expected = inputs @ (q * weight_step.astype(np.float64)) + model.classifier.bias.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7 * np.abs(expected).max())


def test_one_output_as_a_regression_has(core, tmp_path):
    model = quantized(tmp_path / "m", num_labels=1)
    encoder = Core(core, case_of(model))
    ids, types = batch_of(random_rows(40, model.config.vocab_size, seed=2))
    expected = simulated(model, ids, types)
    assert expected.shape == (40, 1)
    for isa in encoder.isas:
        assert close(encoder.logits(ids, types, isa), expected), isa


@pytest.mark.parametrize("shape", ["plain", "odd head width, odd hidden", "wide heads"])
def test_long_inputs_by_every_instruction_set(core, tmp_path, shape):
    """Attention of 64 and more tokens goes another way where the CPU has AMX, and is as exact."""
    model = quantized(tmp_path / "m", {"layers": [["ernie", "skip"]]}, **SHAPES[shape])  # floats up to the classifier
    encoder = Core(core, case_of(model))
    rng = np.random.default_rng(4)
    rows = [
        (rng.integers(5, 150, length).tolist(), [0] * length) for length in (63, 64, 65, 80, 95, 96, 97, 111, 127, 128)
    ]
    ids, types = batch_of(rows)
    expected = simulated(model, ids, types)
    for isa in encoder.isas:
        assert close(encoder.logits(ids, types, isa), expected), isa


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_low_bit_words_are_int8_and_the_same_in_every_bit(core, tmp_path, granularity):
    model = quantized(tmp_path / "m", {"embedding": {"granularity": granularity}})
    case = case_of(model)
    rows = len(case["words"])
    assert case["words"].dtype == np.int8
    words = case["words"].astype(np.float32) * case["floats"][:rows, None]
    np.testing.assert_array_equal(words, deployable(model)[0].ernie.embeddings.word_embeddings.weight.numpy())
    as_floats = {**case, "words": words, "floats": case["floats"][rows:]}
    ids, types = batch_of(random_rows(40, rows, seed=2))
    for isa in Core(core, case).isas:
        found = Core(core, case).logits(ids, types, isa)
        np.testing.assert_array_equal(found, Core(core, as_floats).logits(ids, types, isa))
        assert close(found, simulated(model, ids, types))
    with pytest.raises(ValueError, match="less than its shape needs"):
        Core(core, {**as_floats, "words": case["words"]}).logits(ids, types)


def test_every_length_alone_and_padded(core, tmp_path):
    model = quantized(tmp_path / "m")
    encoder = Core(core, case_of(model))
    rows = [row for length in range(1, 129) for row in random_rows(1, 150, seed=length, longest=128)]
    rows = [((ids * 128)[:length], (types * 128)[:length]) for length, (ids, types) in zip(range(1, 129), rows)]
    together = encoder.logits(*batch_of(rows))
    alone = np.concatenate([encoder.logits(*batch_of([row])) for row in rows])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    expected = np.concatenate([simulated(model, *batch_of([row])) for row in rows[::8]])
    assert close(alone[::8], expected)


def test_padding_anywhere_is_masked_as_the_model_does(core, tmp_path):
    model = quantized(tmp_path / "m")
    encoder = Core(core, case_of(model))
    ids = np.array([[5, 0, 9, 0, 7], [0, 8, 9, 0, 0], [0, 0, 0, 0, 0], [5, 6, 7, 8, 9]])
    types = np.array([[0, 1, 0, 1, 1]] * 4)
    found, expected = encoder.logits(ids, types), simulated(model, ids, types)
    np.testing.assert_allclose(found[[0, 1, 3]], expected[[0, 1, 3]], atol=1e-5)
    np.testing.assert_allclose(found[2], expected[2], atol=1e-2)  # float32 has steps of 1e-3 where the mask of -1e4 is


def test_wrong_ids_and_broken_contents_are_refused(core, tmp_path):
    case = case_of(quantized(tmp_path / "m"))
    encoder = Core(core, case)
    one = np.ones((2, 4), np.int64)
    for ids, types, message in (
        (one * 10**9, one, "input_ids: 1000000000 is not in 0"),
        (one * -1, one, "input_ids: -1 is not in 0"),
        (one, one * 2, "token_type_ids: 2 is not in 0..1"),
        (np.ones((1, 129), np.int64), np.ones((1, 129), np.int64), "129 tokens a row, not in 1..128"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.logits(ids, types)
    with pytest.raises(ValueError, match="no kernels named sse"):
        encoder.logits(one, one, "sse")
    for name in ("integers", "floats", "shifts"):
        for changed in (case[name][:-1], np.append(case[name], case[name][:1])):
            with pytest.raises(ValueError, match="the program holds"):
                Core(core, {**case, name: changed}).logits(one, one)
    for kind in (-1, 3, 4):  # 3: smoothed like the Linear before, of which there is none
        with pytest.raises(ValueError, match="a Linear of the program is"):
            Core(core, {**case, "exact": np.full_like(case["exact"], kind)}).logits(one, one)
    for index in range(8):
        for number in (-5, 0, 2**31 - 1):
            shape = case["shape"].copy()
            shape[index] = number
            if shape[index] != case["shape"][index] and index != 7:
                with pytest.raises(ValueError, match="the program"):
                    Core(core, {**case, "shape": shape}).logits(one, one)


def test_what_it_cannot_compute_is_refused_at_export(tmp_path):
    model = quantized(tmp_path / "m")
    for layer in model.ernie.encoder.layers:
        layer.activation = paddle.nn.functional.silu
    with pytest.raises(UserError, match="Export.engine: native: activation silu; it has gelu, relu"):
        export_native.contents(model)
    model = quantized(tmp_path / "m", {})
    add_smoothing(quantized_linears(model)["ernie.encoder.layers.0.self_attn.out_proj"])
    with pytest.raises(UserError, match="Export.engine: native: it smooths no attention output"):
        export_native.contents(model)


BFLOAT16 = {"avx512_vnni", "avx512_bf16"} <= set(Path("/proc/cpuinfo").read_text().split())
BUILDS = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not BFLOAT16, reason="no AVX-512 with bfloat16 in this CPU")),
]


@pytest.mark.parametrize("attention", [None, {}], ids=["float attention", "integer attention"])
@pytest.mark.parametrize("tiles_in_memory", BUILDS, ids=["this CPU", "tiles in memory"])
def test_sanitizers_find_nothing(sanitized, tmp_path, tiles_in_memory, attention):
    model = quantized(tmp_path / "m", {"attention": attention}, hidden=60, heads=6, intermediate=100)
    rows = random_rows(7, model.config.vocab_size, seed=3) + [([7] * length, [0] * length) for length in (65, 97)]
    ids, types = batch_of(rows)
    case = {**case_of(model), "ids": ids, "types": types, "expected": simulated(model, ids, types)}
    np.savez(tmp_path / "case.npz", **case)
    first = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {**os.environ, "LD_PRELOAD": first.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, native_core.__file__, str(sanitized(tiles_in_memory)), str(tmp_path / "case.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert max(found.values()) < 0.05 * case["expected"].std()
    between = [difference for name, difference in found.items() if name.startswith(native_core.BETWEEN)]
    assert len(between) == 6 * ("amx" in done.stdout)
    if attention is not None:
        assert not any(between)  # integers have no last bits


@pytest.fixture(scope="module")
def both(tiny_ernie, tmp_path_factory):
    """The tiny ERNIE as an artifact with both programs; read only."""
    return make_artifact(tmp_path_factory.mktemp("tiny") / "both", tiny_ernie, with_native=True)


@needs_fast
def test_the_predictor_runs_it_and_it_answers_as_the_plain_program(both):
    rows = random_rows(75, 150)
    plain, fast = Predictor(both, engine="paddle"), Predictor(both)
    assert (plain.engine, fast.engine) == ("paddle", "native")
    expected = plain.logits(rows)
    assert close(fast.logits(rows), expected)
    for batch_size in (1, 3, 100):
        np.testing.assert_allclose(fast.logits(rows, batch_size), fast.logits(rows), atol=1e-6)
    np.testing.assert_array_equal(fast.clone().logits(rows), fast.logits(rows))
    np.testing.assert_allclose(Predictor(both, threads=2).logits(rows[:1]), fast.logits(rows[:1]), atol=1e-6)
    assert fast.predict(["a good film"])[0].label == plain.predict(["a good film"])[0].label


@needs_fast
def test_many_threads_answer_as_one(both):
    model = Predictor(both)
    work = [random_rows(12, 150, seed=seed) for seed in range(60)]
    expected = [model.logits(rows) for rows in work]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for found, wanted in zip(pool.map(model.logits, work), expected):
                assert np.array_equal(found, wanted)


@needs_fast
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc older than 2.33")
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_does_not_grow_with_calls(both, threads):
    model, rows = Predictor(both, threads=threads), random_rows(4, 20)
    for _ in range(1000):
        model.logits(rows)
    before = allocated_bytes()
    for _ in range(1000):
        model.logits(rows)
    assert allocated_bytes() - before < 1000 * 64  # a block of OpenMP's that nothing frees is 128 bytes or more


class MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks"]
    ]
    _fields_ += [("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


def allocated_bytes() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    return mallinfo2().uordblks


@needs_fast
def test_the_operator_refuses_wrong_ids_and_lives_on(both):
    model = Predictor(both)
    expected = model.logits([([5, 6], [0, 0])])
    engine = model._template.clone()
    for name, array in zip(("input_ids", "token_type_ids"), np.array([[[5, 10**6]], [[0, 0]]])):
        engine.get_input_handle(name).copy_from_cpu(array)
    with pytest.raises(OSError, match="input_ids: 1000000 is not in 0"):
        engine.run()
    np.testing.assert_array_equal(model.logits([([5, 6], [0, 0])]), expected)


def test_absent_it_is_a_warning_and_the_plain_program(both, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("ERNIE_KQAT_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        model = Predictor(both)
    assert model.engine == "paddle"
    assert "the native operator is not built (python tools/build_native.py)" in caplog.text
    with pytest.raises(UserError, match="engine: native: the native operator is not built"):
        Predictor(both, engine="native")


def test_no_native_program_is_no_warning(tiny_int8, caplog):
    with caplog.at_level(logging.WARNING):
        assert Predictor(tiny_int8).engine == "paddle"
    assert caplog.text == ""
    with pytest.raises(UserError, match="holds no native program"):
        Predictor(tiny_int8, engine="native")
    with pytest.raises(UserError, match="engine: 'fast' is not one of auto, native, paddle"):
        Predictor(tiny_int8, engine="fast")


def test_another_cpu_is_a_reason(monkeypatch):
    monkeypatch.setattr(native, "_isa", lambda path: "portable")
    assert "no AVX-512 with VNNI" in native.why_not()


def test_a_compiler_that_is_missing_or_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("ERNIE_KQAT_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler: no such compiler"):
        native.build()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UserError, match="false: the native operator does not compile"):
        native.build()
    assert not native.library().exists()


def test_its_files_are_checked(both, tmp_path):
    copy = Path(shutil.copytree(both, tmp_path / "copy"))
    with open(copy / artifact.NATIVE / artifact.PARAMS, "r+b") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="native/inference.pdiparams: its sha256"):
        Predictor(copy)


@pytest.fixture
def sentences(tiny_task, tmp_path):
    """A file of sentences without labels."""
    rows = (tiny_task / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    path = tmp_path / "s.txt"
    path.write_text("\n".join(row.split("\t")[0] for row in rows), encoding="utf-8")
    return path


@needs_fast
def test_export_verifies_both_programs(tool, tiny_ernie, sentences, tmp_path):
    options = [
        "--model",
        tiny_ernie,
        "--calibration",
        sentences,
        "--output",
        tmp_path / "out",
        "--max-length",
        MAX_LENGTH,
    ]
    code, out, err = tool("export", *options, "-o", "Export.engine=native")
    assert code == 0, err
    assert "native program" in out
    found = artifact.read_manifest(tmp_path / "out")["verification"]
    assert found["native"]["agreement"] >= 0.995
    assert found["native"]["rms_over_std"] <= 0.03
    assert found["native"]["size_bytes"] < found["size_bytes"]
    assert Predictor(tmp_path / "out").engine == "native"
    code, _, err = tool("export", *options, "-o", "Export.engine=fast")
    assert code == 2
    assert "Export.engine" in err


@needs_fast
def test_exported_alone_it_is_all_there_is(tiny_ernie, sentences, monkeypatch, tmp_path):
    alone = tmp_path / "alone"
    settings = config.Export(engine="native", plain=False)
    exporter.export_folder(str(tiny_ernie), str(sentences), str(alone), settings, config.Quant(), MAX_LENGTH)
    manifest = artifact.read_manifest(alone)
    assert not [name for name in manifest["files"] if name.startswith(artifact.MODEL.partition(".")[0])]
    assert manifest["verification"]["agreement"] >= 0.995  # of the plain program, which was verified all the same
    model = Predictor(alone)
    assert model.engine == "native"
    assert [answer.label for answer in model.predict(["a good film"])]
    assert models.load({"alone": alone})[0].labels == manifest["labels"]
    with pytest.raises(UserError, match="holds the native program alone .*: engine: paddle"):
        Predictor(alone, engine="paddle")
    with pytest.raises(UserError, match="holds no plain program, which is what is packed"):
        pack(alone, tmp_path / "packed")
    monkeypatch.setenv("ERNIE_KQAT_HOME", str(tmp_path))
    with pytest.raises(UserError, match="holds the native program alone .*: the native operator is not built"):
        Predictor(alone)


def test_no_program_at_all_is_refused(tiny_ernie, sentences, tmp_path):
    settings = config.Export(plain=False)
    with pytest.raises(UserError, match="Export.plain: false: leaves no program at all"):
        exporter.export_folder(
            str(tiny_ernie), str(sentences), str(tmp_path / "out"), settings, config.Quant(), MAX_LENGTH
        )
    assert not (tmp_path / "out").exists()


@needs_fast
def test_paddle_serving_runs_it(both):
    pytest.importorskip("paddle_serving_server")
    expected = Predictor(both).predict(["a good film", "a very dull story , but a fresh plot"])
    with serve(both) as running:
        texts = ["a good film", "a very dull story , but a fresh plot"]
        found = ask(running.http, {"texts": texts, "logits": True})[2]["predictions"]
    for one, wanted in zip(found, expected):
        np.testing.assert_allclose(one["logits"], wanted.logits, atol=1e-6)
