"""A TensorRT artifact in ONNX Runtime, an engine that shares no code with Paddle: translated operator by operator, run on a CPU.

    python -m venv .venv-onnx && .venv-onnx/bin/pip install -r requirements-onnx.txt
    python tools/benchmarks/tensorrt_onnx.py --model ARTIFACT --data dev.tsv

Prints one line of JSON: ONNX Runtime against Paddle, both on the artifact's own program. Needs no GPU and proves nothing of one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import onnx
import paddle
from onnx import TensorProto, helper, numpy_helper
from paddle.base import core

import ernie_kqat  # noqa: F401  before Paddle
from ernie_kqat import artifact, shapes
from ernie_kqat.data.readers import read_examples
from ernie_kqat.errors import UserError, run_tool
from ernie_kqat.evaluate import comparison
from ernie_kqat.export import program
from ernie_kqat.predictor import Predictor

OPSET = 20  # Gelu is an operator from here on
PYTHON = Path(__file__).parents[2] / ".venv-onnx/bin/python"
QMAX = 127
BATCH = 32
SAME = {"elementwise_add": "Add", "elementwise_sub": "Sub", "elementwise_mul": "Mul", "equal": "Equal", "tanh": "Tanh"}
SAME |= {"relu": "Relu", "shape": "Shape", "dropout": "Identity", "assign": "Identity"}
KINDS = {0: TensorProto.BOOL, 2: TensorProto.INT32, 3: TensorProto.INT64, 5: TensorProto.FLOAT}  # Paddle's VarType
NUMBERS = {2: np.int32, 3: np.int64, 5: np.float32}
# Runs where ONNX Runtime is installed: model, a file of batches, a file for their logits.
RUN = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
batches = numpy.load(sys.argv[2])
runs = [session.run(None, {"input_ids": batches[k][0], "token_type_ids": batches[k][1]})[0] for k in batches.files]
numpy.savez(sys.argv[3], *runs)
print(onnxruntime.__version__)
"""


class Translation:
    """A Paddle program as an ONNX graph; tensors keep their names."""

    def __init__(self, stem: Path):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        with program.static_mode():
            self.scope = core.Scope()
            with paddle.static.scope_guard(self.scope):
                executor = paddle.static.Executor(paddle.CPUPlace())
                loaded, self.inputs, (output,) = paddle.static.load_inference_model(str(stem), executor)
            self.output = output.name
            for op in loaded.global_block().ops:
                if op.type not in ("feed", "fetch"):
                    self._translate(op)

    def model(self) -> onnx.ModelProto:
        ids = [helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "tokens"]) for name in self.inputs]
        logits = helper.make_tensor_value_info(self.output, TensorProto.FLOAT, ["rows", "classes"])
        stored = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "qdq", ids, [logits], stored)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
        onnx.checker.check_model(made)
        return made

    def _translate(self, op) -> None:
        if op.type in SAME:
            self._node(SAME[op.type], op, *(self._input(op, name) for name in ("X", "Y", "Input") if _has(op, name)))
        elif hasattr(self, f"_{op.type}"):
            getattr(self, f"_{op.type}")(op)
        else:
            raise UserError(f"{op.type}: no translation of this operator to ONNX")

    def _node(self, kind: str, op, *inputs: str, **attributes) -> None:
        name = "Y" if _has(op, "Y", out=True) else "Out"
        self.nodes.append(helper.make_node(kind, inputs, op.output(name), **attributes))

    def _input(self, op, name: str = "X") -> str:
        return self._stored(op.input(name)[0])

    def _stored(self, name: str) -> str:
        """The tensor, put into the constants if it is a parameter."""
        var = self.scope.find_var(name)
        if var is not None and var.get_tensor()._is_initialized() and name not in self.constants:
            self.constants[name] = np.array(var.get_tensor())
        return name

    def _constant(self, op, name: str, value) -> str:
        name = f"{op.output_arg_names[0]}.{name}"
        self.constants[name] = np.asarray(value)
        return name

    def _fill_constant(self, op) -> None:
        value = np.array([op.attr("value")], NUMBERS[op.attr("dtype")])
        if not (_has(op, "ShapeTensorList") and op.input("ShapeTensorList")):
            self.constants[op.output("Out")[0]] = np.full(op.attr("shape"), value[0])
            return
        parts, joined = [], f"{op.output('Out')[0]}.shape"
        for name in op.input("ShapeTensorList"):
            parts.append(f"{name}.1")
            axes = self._constant(op, "axes", np.array([0]))
            self.nodes.append(helper.make_node("Unsqueeze", [name, axes], [parts[-1]]))
        self.nodes.append(helper.make_node("Concat", parts, [joined], axis=0))
        self._node("ConstantOfShape", op, joined, value=numpy_helper.from_array(value))

    def _cast(self, op) -> None:
        self._node("Cast", op, self._input(op), to=KINDS[op.attr("out_dtype")])

    def _scale(self, op) -> None:
        """Also what Paddle puts before a fetch, with factor 1."""
        scaled = f"{op.output('Out')[0]}.scaled"
        factor, bias = (self._constant(op, name, np.float32(op.attr(name))) for name in ("scale", "bias"))
        self.nodes.append(helper.make_node("Mul", [self._input(op), factor], [scaled]))
        self._node("Add", op, scaled, bias)

    def _unsqueeze2(self, op) -> None:
        self._node("Unsqueeze", op, self._input(op), self._constant(op, "axes", np.array(op.attr("axes"))))

    def _lookup_table_v2(self, op) -> None:
        table = self._input(op, "W")
        if op.attr("padding_idx") >= 0:
            self.constants[table][op.attr("padding_idx")] = 0
        self._node("Gather", op, table, op.input("Ids")[0])

    def _slice(self, op) -> None:
        axes, starts = op.attr("axes"), op.attr("starts")
        if op.attr("decrease_axis") != axes or len(axes) != 1:
            raise UserError("slice: only the one that takes an element of an axis is translated")
        self._node("Gather", op, self._input(op, "Input"), self._constant(op, "at", np.int64(starts[0])), axis=axes[0])

    def _cumsum(self, op) -> None:
        self._node("CumSum", op, self._input(op), self._constant(op, "axis", np.int64(op.attr("axis"))))

    def _layer_norm(self, op) -> None:
        names = [self._input(op, name) for name in ("X", "Scale", "Bias")]
        self._node("LayerNormalization", op, *names, axis=op.attr("begin_norm_axis"), epsilon=op.attr("epsilon"))

    def _matmul_v2(self, op) -> None:
        if op.attr("trans_x"):
            raise UserError("matmul_v2: a transposed first input is not translated")
        y = self._input(op, "Y")
        if op.attr("trans_y"):
            turned = f"{op.output('Out')[0]}.turned"
            self.nodes.append(helper.make_node("Transpose", [y], [turned], perm=[0, 1, 3, 2]))
            y = turned
        self._node("MatMul", op, self._input(op), y)

    def _reshape2(self, op) -> None:
        self._node("Reshape", op, self._input(op), self._constant(op, "shape", np.array(op.attr("shape"), np.int64)))

    def _transpose2(self, op) -> None:
        self._node("Transpose", op, self._input(op), perm=op.attr("axis"))

    def _softmax(self, op) -> None:
        self._node("Softmax", op, self._input(op), axis=op.attr("axis"))

    def _gelu(self, op) -> None:
        self._node("Gelu", op, self._input(op), approximate="tanh" if op.attr("approximate") else "none")

    def _clip(self, op) -> None:
        low, high = (self._constant(op, name, np.float32(op.attr(name))) for name in ("min", "max"))
        self._node("Clip", op, self._input(op), low, high)

    def _quantize_linear(self, op) -> None:
        self._q_or_dq("QuantizeLinear", op)

    def _dequantize_linear(self, op) -> None:
        self._q_or_dq("DequantizeLinear", op)

    def _q_or_dq(self, kind: str, op) -> None:
        """ONNX's scale is the step; Paddle's `Scale` is 127 of them."""
        scale = np.array(self.scope.find_var(op.input("Scale")[0]).get_tensor()) / np.float32(QMAX)
        per_tensor = op.attr("quant_axis") < 0
        step = self._constant(op, "step", scale[0] if per_tensor else scale)
        zero = self._constant(op, "zero", np.zeros(() if per_tensor else scale.shape, np.int8))
        self._node(kind, op, self._input(op), step, zero, **({} if per_tensor else {"axis": op.attr("quant_axis")}))


def _has(op, name: str, out: bool = False) -> bool:
    return name in (op.output_names if out else op.input_names)


def run(model: onnx.ModelProto, batches: list[np.ndarray], python: Path) -> tuple[list[np.ndarray], str]:
    """Logits of each batch, int64 [2, rows, tokens], by ONNX Runtime in the environment of `python`; and its version."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("model.onnx", "batches.npz", "logits.npz")]
        onnx.save(model, files[0])
        np.savez(files[1], *batches)
        done = subprocess.run([python, "-c", RUN, *files], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{python}: ONNX Runtime failed: {done.stderr.strip()[-500:]}")
        with np.load(files[2]) as found:
            return [found[name] for name in found.files], done.stdout.strip()


def compare(folder: Path, rows: list, python: Path) -> dict:
    """ONNX Runtime against Paddle on rows (input_ids, token_type_ids)."""
    manifest = artifact.read_manifest(folder)
    if manifest["engine"] != artifact.TENSORRT:
        raise UserError(f"{folder}: engine {manifest['engine']}; export it with --target tensorrt")
    reference = Predictor(folder, allow_unverified=True, engine="paddle").logits(rows)
    arrays = [np.array(row, np.int64) for row in rows]
    groups = [arrays[start : start + BATCH] for start in range(0, len(arrays), BATCH)]
    batches = [shapes.join(group, manifest["pad_token_id"], manifest["max_length"]) for group in groups]
    model = Translation(folder / Path(artifact.MODEL).stem).model()
    logits, version = run(model, batches, python)
    kinds = [node.op_type for node in model.graph.node]
    return {
        "rows": len(rows),
        "onnxruntime": version,
        "quantize": kinds.count("QuantizeLinear"),
        "dequantize": kinds.count("DequantizeLinear"),
        **comparison(np.concatenate(logits), reference),
        "margin_over_std": _margin(np.concatenate(logits), reference),
    }


def _margin(logits: np.ndarray, reference: np.ndarray) -> float:
    """How far apart the two likeliest labels are, at most, where the two engines choose different ones, over the logits' std."""
    best = np.sort(reference, axis=1)
    margin = (best[:, -1] - best[:, -2]) * (logits.argmax(axis=1) != reference.argmax(axis=1))
    return float(margin.max() / reference.std())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", metavar="DIR", required=True, help="an artifact of tools/export.py --target tensorrt"
    )
    parser.add_argument("--data", metavar="DATA", required=True, help="sentences")
    parser.add_argument(
        "--python", metavar="FILE", default=PYTHON, help="Python with ONNX Runtime (default %(default)s)"
    )
    arguments = parser.parse_args()
    if not Path(arguments.python).is_file():
        raise UserError(f"--python: {arguments.python}: no such file (requirements-onnx.txt says how to make it)")
    predictor = Predictor(arguments.model, allow_unverified=True, engine="paddle")
    examples = read_examples(Path(arguments.data), None, None, require_label=False)
    pairs = [example.text_pair for example in examples] if predictor.pair else None
    encoded = predictor.encode([example.text for example in examples], pairs)
    rows = [(row.input_ids, row.token_type_ids) for row in encoded]
    print(json.dumps(compare(Path(arguments.model), rows, Path(arguments.python))))
    return 0


if __name__ == "__main__":
    run_tool(main)
