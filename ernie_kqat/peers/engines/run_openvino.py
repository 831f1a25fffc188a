"""OpenVINO on Paddle's fp32 program. `prepare FOLDER`: NNCF's post-training quantization, as its documentation says for
transformers, of FOLDER/inference.pdmodel with the rows of FOLDER/calibration.npz; then a worker."""

import importlib.metadata
import sys
from pathlib import Path

import numpy as np
import openvino
import worker

PRECISION = {"openvino fp32": "f32", "openvino bf16": "bf16", "openvino int8": "f32", "openvino int8+bf16": "bf16"}


def prepare(folder: Path) -> None:
    import nncf

    rows = worker.read_rows(str(folder / "calibration.npz"))["calibration"]
    items = [{"input_ids": row[:1], "token_type_ids": row[1:]} for row in rows]
    model = openvino.Core().read_model(folder / "inference.pdmodel")
    openvino.save_model(model, folder / "fp32.xml", compress_to_fp16=False)
    dataset = nncf.Dataset(items)
    int8 = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(items))
    openvino.save_model(int8, folder / "int8.xml", compress_to_fp16=False)


def load(engine: str, folder: str, threads: int):
    core = openvino.Core()
    model = core.read_model(Path(folder, "int8.xml" if "int8" in engine else "fp32.xml"))
    options = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": threads}
    options["INFERENCE_PRECISION_HINT"] = PRECISION[engine]
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def answer(rows: list) -> np.ndarray:
        ids, types = worker.padded(rows)
        request.infer({"input_ids": ids, "token_type_ids": types}, share_inputs=True)
        return request.get_output_tensor().data.copy()

    return answer, {name: importlib.metadata.version(name) for name in ("openvino", "nncf")}


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]))
    else:
        worker.serve(load)
