"""ONNX Runtime on Paddle's fp32 program. `prepare FOLDER`: FOLDER/inference.pdmodel to ONNX, and from there ONNX Runtime's
dynamic quantization, which its documentation recommends for transformers on CPUs; then a worker."""

import zlib  # noqa: F401, I001  before paddle, which paddle2onnx loads
import importlib.metadata
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import worker

FILE = {"onnxruntime fp32": "fp32.onnx", "onnxruntime int8": "int8.onnx"}


def prepare(folder: Path) -> None:
    import paddle2onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    fp32, folded, int8 = (str(folder / f"{name}.onnx") for name in ("fp32", "folded", "int8"))
    paddle2onnx.export(
        str(folder / "inference.pdmodel"), str(folder / "inference.pdiparams"), fp32, 13, enable_onnx_checker=False
    )
    # The converter writes weights as nodes; quantize_dynamic leaves those alone and says nothing. Folded, they are initializers.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = folded
    onnxruntime.InferenceSession(fp32, options, ["CPUExecutionProvider"])
    quantize_dynamic(folded, int8, weight_type=QuantType.QInt8, per_channel=True)


def load(engine: str, folder: str, threads: int):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(str(Path(folder, FILE[engine])), options, ["CPUExecutionProvider"])

    def answer(rows: list) -> np.ndarray:
        ids, types = worker.padded(rows)
        return session.run(None, {"input_ids": ids, "token_type_ids": types})[0]

    return answer, {name: importlib.metadata.version(name) for name in ("onnxruntime", "paddle2onnx")}


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]))
    else:
        worker.serve(load)
