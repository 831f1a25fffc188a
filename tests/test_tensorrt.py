"""The TensorRT target, as far as it goes without a GPU: the numbers of its program, TensorRT's rules, and clear refusals."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from artifacts import MAX_LENGTH, make_artifact, random_rows
from asking import ask
from running import serve
from test_program import OneLinear, calibrated, ernie

from ernie_kqat import KurtosisQAT, Predictor, UserError, artifact, config, tasks, tensorrt
from ernie_kqat.export import program, qdq
from ernie_kqat.export.exporter import write_unverified
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.quantizers import attach
from ernie_kqat.serving import nursery

ROOT = Path(__file__).parents[1]
ONNX_PYTHON = Path(os.environ.get("ONNX_PYTHON", ROOT / ".venv-onnx/bin/python"))


def run(stem, *arrays):
    """The QDQ program on the CPU, as it is written."""
    made = paddle.inference.Config(f"{stem}.pdmodel", f"{stem}.pdiparams")
    made.disable_glog_info()
    tensorrt.configure_reference(made)
    predictor = paddle.inference.create_predictor(made)
    for name, array in zip(predictor.get_input_names(), arrays):
        predictor.get_input_handle(name).copy_from_cpu(array)
    predictor.run()
    return predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()


def operators(stem):
    """Operator kinds of a saved program, in order."""
    with program.static_mode():
        loaded = paddle.static.deserialize_program(stem.with_suffix(".pdmodel").read_bytes())
    return [op.type for op in loaded.global_block().ops]


def parameters(stem):
    """{name: array} of a saved program."""
    found = {}

    def read(loaded, scope):
        for name, var in loaded.global_block().vars.items():
            if var.persistable and name not in ("feed", "fetch"):
                found[name] = np.array(scope.find_var(name).get_tensor())
        return loaded

    program.rewrite(stem, stem.with_name("copy"), read)
    return found


@pytest.fixture(scope="module")
def tiny_trt(tiny_ernie, tmp_path_factory):
    """The tiny ERNIE as a TensorRT artifact; read only."""
    return make_artifact(tmp_path_factory.mktemp("tiny") / "tensorrt", tiny_ernie, artifact.TENSORRT)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("kind", ["channel_wise_abs_max", "abs_max"])
def test_one_linear_equals_integer_arithmetic(tmp_path, bits, activation_bits, kind):
    rng = np.random.default_rng(3)
    spread = np.logspace(-2, 2, 96) if kind == "channel_wise_abs_max" else np.exp(0.3 * rng.standard_normal(96))
    weight = (rng.standard_normal((64, 96)) * spread).astype(np.float32)
    bias = rng.standard_normal(96).astype(np.float32)
    x = (rng.standard_normal((3, 5, 64)) * 2).astype(np.float32)
    options = {"weight_bits": bits, "activation_bits": activation_bits, "weight_quantize_type": kind}
    model = KurtosisQAT(options).quantize(OneLinear(weight, bias))
    model.eval()
    calibrated(model, paddle.to_tensor(x))
    x = x * 1.7
    layer = model.linear
    w_int, w_step = layer._fake_quant_weight.integers(layer.weight)
    x_step = float(layer._fake_quant_input.step())
    low, high = -(2 ** (activation_bits - 1)), 2 ** (activation_bits - 1) - 1
    x_int = np.clip(np.rint(x * np.float32(1 / np.float32(x_step))), low, high).astype(np.float64)
    assert (x_int.min(), x_int.max()) == (low, high)  # so saturation at -128 is compared too
    exact = (x_int @ w_int.astype(np.float64)) * (x_step * w_step.astype(np.float64)) + bias
    qdq.save(model, tmp_path / "m", [paddle.static.InputSpec([None, None, 64], "float32", name="x")])
    scale = np.abs(exact).max(axis=(0, 1))
    assert (np.abs(run(tmp_path / "m", x) - exact) / scale).max() < 1e-5
    (stored,) = [value for value in parameters(tmp_path / "m").values() if value.dtype == np.int8]
    np.testing.assert_array_equal(stored, w_int)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_bits": 4, "weight_quantize_type": "abs_max"},
        {"activation_bits": 4},
        {"layers": [["linear2|classifier", "skip"]]},
    ],
)
def test_a_whole_ernie_equals_its_simulation(tmp_path, tiny_ernie, options):
    _, model, ids = ernie(tiny_ernie, **options)
    simulated = model(paddle.to_tensor(ids), paddle.to_tensor(np.zeros_like(ids))).numpy()
    qdq.save(model, tmp_path / "m")
    assert np.abs(run(tmp_path / "m", ids, np.zeros_like(ids)) - simulated).max() < 0.02 * simulated.std()


def test_an_offset_and_smoothing_stay_exact(tmp_path, tiny_ernie):
    """LSQ+'s offset is in the bias (decision 11), SmoothQuant's division before the quantize operator."""
    quant = config.Quant(activation=config.ActivationQuant(quantizer="lsq", offset=True, calibration_batches=1))
    qat = KurtosisQAT.from_options(quant)
    model = qat.quantize(load_classifier(str(tiny_ernie), 2))
    model.eval()
    ids = np.random.default_rng(0).integers(5, 90, (8, 11))
    inputs = paddle.to_tensor(ids), paddle.to_tensor(np.zeros_like(ids))
    layers = attach.quantized_linears(model)
    smoothed = next(layer for name, layer in layers.items() if name.endswith("linear2"))
    attach.add_smoothing(smoothed)
    attach.smooth(smoothed, np.linspace(0.5, 2, smoothed.weight.shape[0]).astype(np.float32))
    calibrated(model, *inputs)
    assert any(layer._fake_quant_input.offset() for layer in layers.values())
    simulated = model(*inputs).numpy()
    qdq.save(model, tmp_path / "m")
    assert np.abs(run(tmp_path / "m", ids, np.zeros_like(ids)) - simulated).max() < 0.02 * simulated.std()


def test_only_inputs_of_linears_are_quantized_once_each(tiny_trt):
    kinds = operators(tiny_trt / "inference")
    assert kinds.count("quantize_linear") == 2 * 4 + 2  # q, k and v share one; no outputs
    assert kinds.count("dequantize_linear") == (2 * 4 + 2) + (2 * 6 + 2)
    assert "fake_quantize_dequantize" not in "".join(kinds)


def mutated(stem, change):
    """`stem`'s rules broken by change(operators by kind, scope, block)."""

    def altered(loaded, scope):
        block = loaded.global_block()
        by_kind = {}
        for op in block.ops:
            by_kind.setdefault(op.type, []).append(op)
        change(by_kind, scope, block)
        return loaded

    target = stem.with_name("mutated")
    program.rewrite(stem, target, altered)
    return qdq.broken_rules(target, 14)


def set_value(scope, name, value):
    scope.find_var(name).get_tensor().set(value, paddle.CPUPlace())


def zero_point(ops, scope, block):
    set_value(scope, ops["quantize_linear"][0].input("ZeroPoint")[0], np.array([1], np.int32))


def negative_scale(ops, scope, block):
    set_value(scope, ops["quantize_linear"][0].input("Scale")[0], np.array([-1], np.float32))


def rows_axis(ops, scope, block):
    ops["dequantize_linear"][1]._set_attr("quant_axis", 0)


def half_away(ops, scope, block):
    ops["quantize_linear"][0]._set_attr("round_type", 1)


def weight_of_minus_128(ops, scope, block):
    name = ops["dequantize_linear"][1].input("X")[0]
    value = np.array(scope.find_var(name).get_tensor())
    value[0, 0] = -128
    set_value(scope, name, value)


def unquantized_input(ops, scope, block):
    matmul, raw = ops["matmul_v2"][0], ops["quantize_linear"][0].input("X")[0]
    matmul._rename_input(matmul.input("X")[0], raw)


def other_reader(ops, scope, block):
    gelu = ops["gelu"][0]
    gelu._rename_input(gelu.input("X")[0], ops["dequantize_linear"][0].output("Y")[0])


def other_scale(ops, scope, block):
    back = ops["dequantize_linear"][0]
    back._rename_input(back.input("Scale")[0], ops["quantize_linear"][1].input("Scale")[0])


def written_twice(ops, scope, block):
    """In place, as Paddle saves the multiplication by 1 at the end of a program that is saved for the second time."""
    tanh = ops["tanh"][0]
    x, y = tanh.input("X")[0], tanh.output("Out")[0]
    for op in block.ops:
        if y in op.input_arg_names:
            op._rename_input(y, x)
    tanh._rename_output(y, x)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (zero_point, "zero point is not 0"),
        (negative_scale, "scale is not positive"),
        (rows_axis, "one for each column"),
        (half_away, "rounded half to even"),
        (weight_of_minus_128, "-127..127"),
        (unquantized_input, "one of its inputs is not quantized"),
        (other_reader, "gelu reads"),
        (other_scale, "dequantize_linear reads"),
        (written_twice, "is written 2 times"),
        (lambda *_: None, None),
    ],
)
def test_a_program_that_breaks_a_rule_of_tensorrts_is_seen(tmp_path, tiny_trt, change, complaint):
    for suffix in (".pdmodel", ".pdiparams"):
        (tmp_path / f"m{suffix}").write_bytes((tiny_trt / f"inference{suffix}").read_bytes())
    broken = mutated(tmp_path / "m", change)
    if complaint is None:
        assert broken == []
    else:
        assert complaint in "; ".join(broken)


def test_the_profile_covers_every_tensor_from_the_smallest_batch_to_the_largest(tiny_trt):
    text = (tiny_trt / artifact.SHAPES).read_text()
    entries = {}
    for part in text.split("shape_range_info {")[1:]:
        fields = [line.strip().split(": ") for line in part.splitlines() if ": " in line]
        name = json.loads(fields[0][1])
        entries.setdefault(name, {key: [int(v) for k, v in fields if k == key] for key, _ in fields[1:]})
    least, common = [1, 4], [tensorrt.ROWS, 16]
    for name in ("input_ids", "token_type_ids"):
        assert entries[name]["min_shape"] == least
        assert entries[name]["max_shape"] == [tensorrt.ROWS, MAX_LENGTH]
        assert entries[name]["opt_shape"] == common
    with program.static_mode():
        loaded = paddle.static.deserialize_program((tiny_trt / artifact.MODEL).read_bytes())
    quantized = [op.output("Y")[0] for op in loaded.global_block().ops if op.type == "quantize_linear"]
    assert set(quantized) <= set(entries)


class Recorded:
    """Takes every call that Paddle's Config has, and no other."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        assert hasattr(paddle.inference.Config, name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_the_config_is_of_explicit_quantization(tmp_path):
    made = Recorded()
    tensorrt.configure(made, tmp_path)
    calls = {name: (args, kwargs) for name, args, kwargs in made.calls}
    assert list(calls) == [
        "enable_use_gpu",
        "enable_memory_optim",
        "enable_tensorrt_engine",
        "enable_tensorrt_explicit_quantization",
        "enable_tuned_tensorrt_dynamic_shape",
    ]
    engine = calls["enable_tensorrt_engine"][1]
    assert engine["precision_mode"] == paddle.inference.PrecisionType.Int8
    assert not engine["use_calib_mode"]
    assert calls["enable_tuned_tensorrt_dynamic_shape"][0] == (str(tmp_path / artifact.SHAPES), False)


def test_paddle_itself_refuses_the_config_here(tmp_path):
    if not tensorrt.why_not():
        pytest.skip("this Paddle has TensorRT")
    with pytest.raises(RuntimeError, match="TENSORRT"):
        tensorrt.configure(paddle.inference.Config(), tmp_path)


@pytest.mark.parametrize(
    ("cuda", "compiled", "runtime", "gpus", "reason"),
    [
        (False, (0, 0, 0), (0, 0, 0), 0, "built without TensorRT; install paddlepaddle-gpu 2.6.2"),
        (True, (0, 0, 0), (0, 0, 0), 1, "built without TensorRT"),
        (True, (8, 4, 2), (8, 4, 2), 1, "built with TensorRT 8.4.2; install"),
        (True, (8, 5, 1), (0, 0, 0), 1, "libraries are not found"),
        (True, (8, 6, 1), (8, 6, 1), 0, "no GPU"),
        (True, (8, 5, 1), (8, 5, 1), 1, ""),
    ],
)
def test_the_reason_says_what_is_missing(monkeypatch, cuda, compiled, runtime, gpus, reason):
    monkeypatch.setattr(tensorrt.core, "is_compiled_with_cuda", lambda: cuda)
    monkeypatch.setattr(tensorrt.core, "get_cuda_device_count", lambda: gpus, raising=False)
    monkeypatch.setattr(paddle.inference, "get_trt_compile_version", lambda: compiled)
    monkeypatch.setattr(paddle.inference, "get_trt_runtime_version", lambda: runtime)
    found = tensorrt.why_not()
    assert reason in found
    assert bool(reason) == bool(found)


@pytest.fixture
def without_tensorrt(monkeypatch):
    monkeypatch.setattr(tensorrt, "why_not", lambda: "no TensorRT here")


def test_a_predictor_refuses_where_there_is_no_tensorrt(tiny_trt, without_tensorrt):
    with pytest.raises(UserError, match=r"tensorrt: a program for TensorRT: no TensorRT here"):
        Predictor(tiny_trt)
    with pytest.raises(UserError, match="holds no native program"):
        Predictor(tiny_trt, engine="native")


def test_a_predictor_gives_tensorrt_batches_of_the_profile(tiny_trt, monkeypatch):
    """With the reference in TensorRT's place: what is asked of the engine is within the profile, and each row is answered."""
    asked = []
    monkeypatch.setattr(tensorrt, "why_not", lambda: "")
    monkeypatch.setattr(tensorrt, "configure", lambda made, folder: tensorrt.configure_reference(made))
    model = Predictor(tiny_trt)
    assert model.engine == "tensorrt"
    pad = model._batch
    monkeypatch.setattr(model, "_batch", lambda rows: asked.append(pad(rows).shape) or pad(rows))
    rows = random_rows(70, model.manifest["vocab_size"])
    found = model.logits(rows, batch_size=1024)
    assert max(shape[1] for shape in asked) == tensorrt.ROWS
    np.testing.assert_allclose(found, Predictor(tiny_trt, engine="paddle").logits(rows), atol=1e-5)


@pytest.mark.skipif(not tensorrt.why_not(), reason="this machine has TensorRT")
def test_a_service_refuses_at_its_start(tiny_trt):
    command = [sys.executable, str(ROOT / "tools/serve.py"), "--model", str(tiny_trt), "--port", "0", "--workers", "1"]
    ports = ["--grpc-port", "0", "--metrics-port", "0"]
    done = subprocess.run([*command, *ports], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "a program for TensorRT: this Paddle was built without TensorRT" in done.stderr


def test_serving_runs_what_the_config_says_in_parts(tiny_trt):
    """In a process of its own: Paddle Serving's adapter with the reference in TensorRT's place."""
    code = f"""
import ernie_kqat, numpy as np
from pathlib import Path
from ernie_kqat import Predictor, tensorrt
from ernie_kqat.serving.pipeline import Pipeline
folder = Path({str(tiny_trt)!r})
calls = []
pipeline = Pipeline(folder, configure=lambda made: calls.append(1) or tensorrt.configure_reference(made), most_rows=3)
ids = np.random.default_rng(0).integers(5, 90, (8, 12))
batch = np.stack([ids, np.zeros_like(ids)])
reference = Predictor(folder, engine="paddle").logits([(row, np.zeros_like(row)) for row in ids])
assert calls == [1]
np.testing.assert_allclose(pipeline.logits(batch, 8), reference, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


STAND_IN = """
import ernie_kqat
from ernie_kqat import tensorrt
tensorrt.why_not = lambda: ""
tensorrt.configure = lambda made, folder: tensorrt.configure_reference(made)
"""


def test_a_service_answers_from_workers_that_load_for_themselves(tiny_trt, tmp_path, monkeypatch):
    """The reference in TensorRT's place in every process of the service."""
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    with serve(tiny_trt) as running:
        status, _, answer = ask(running.http, {"texts": ["a good film"] * 40, "logits": True})
    assert status == 200
    expected = Predictor(tiny_trt, engine="paddle").predict(["a good film"])[0].logits
    np.testing.assert_allclose([row["logits"] for row in answer["predictions"]], [expected] * 40, atol=1e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_ernie, tiny_task):
    """tools/export.py --target tensorrt, by PTQ; (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("exported") / "artifact"
    rows = (tiny_task / "train.tsv").read_text().splitlines()[1:]
    sentences = folder.with_name("sentences.txt")
    sentences.write_text("".join(row.split("\t")[0] + "\n" for row in rows))
    command = [sys.executable, str(ROOT / "tools/export.py"), "--model", str(tiny_ernie), "--target", "tensorrt"]
    options = ["--calibration", str(sentences), "--output", str(folder)]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    return folder, done.stdout


def test_the_export_is_verified_and_says_how(exported):
    folder, out = exported
    manifest = artifact.read_manifest(folder)
    found = manifest["verification"]
    assert (manifest["engine"], found["passed"]) == (artifact.TENSORRT, True)
    assert found["agreement"] >= 0.995
    assert found["rms_over_std"] <= 0.03
    assert (found["int8_ops"], found["latency_ms"]) == (None, None)
    assert "never run in TensorRT" in out
    assert artifact.SHAPES in manifest["files"]


@pytest.mark.parametrize(
    ("quant", "engine", "message"),
    [
        (None, "paddle", "Export.target: tensorrt: the model is not quantized"),
        (config.Quant(), "native", "the native program is for CPUs"),
    ],
)
def test_what_tensorrt_cannot_be_the_target_of_is_refused(tmp_path, quant, engine, message):
    export = config.Export(engine=engine, target="tensorrt")
    with pytest.raises(UserError, match=message):
        write_unverified(
            SimpleNamespace(quant=quant, task=tasks.find("classification")()), None, None, tmp_path / "a", export
        )
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def tool_onnx():
    pytest.importorskip("onnx")
    spec = importlib.util.spec_from_file_location("tensorrt_onnx", ROOT / "tools/benchmarks/tensorrt_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_onnx_gives_the_same_answers_by_numpy(tiny_trt, tool_onnx):
    """ONNX's own reference implementation, in NumPy, on the program translated operator by operator."""
    from onnx.reference import ReferenceEvaluator

    made = tool_onnx.Translation(tiny_trt / "inference").model()
    ids = np.random.default_rng(0).integers(5, 90, (6, 12))
    ids[3:, 8:] = 0
    kinds = np.zeros_like(ids)
    (logits,) = ReferenceEvaluator(made).run(None, {"input_ids": ids, "token_type_ids": kinds})
    reference = run(tiny_trt / "inference", ids, kinds)
    assert np.sqrt(np.mean((logits - reference) ** 2)) < 0.03 * reference.std()
    assert [node.op_type for node in made.graph.node].count("QuantizeLinear") == 10


@pytest.mark.skipif(not ONNX_PYTHON.is_file(), reason="no .venv-onnx (requirements-onnx.txt) and no $ONNX_PYTHON")
def test_onnx_runtime_gives_the_same_answers(tiny_trt, tool_onnx):
    rows = random_rows(64, Predictor(tiny_trt, engine="paddle").manifest["vocab_size"])
    found = tool_onnx.compare(tiny_trt, rows, ONNX_PYTHON)
    assert found["agreement"] == 1.0
    assert found["margin_over_std"] == 0.0
    assert found["rms_over_std"] < 0.03
    assert (found["quantize"], found["dequantize"]) == (10, 24)


def test_nothing_of_tensorrt_is_loaded_before_the_fork(tiny_trt):
    asked = {"models": [{"folder": str(tiny_trt), "version": "any"}], "threads": 1}
    assert nursery._load_shared(asked) is None
    assert nursery._load_all(asked)[1].endswith("start it again")
