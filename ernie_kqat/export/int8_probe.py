"""Does this CPU compute INT8 exactly? One Linear of whole numbers, compiled and run, against integer arithmetic."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import paddle
import paddle.inference

from .. import artifact
from ..quantizers.attach import LayerGrid
from . import program
from .int8_ops import int8_ops_run

IN, OUT, ROWS = 256, 96, 16
INPUT_STEP, WEIGHT_STEP = 1 / 64, 1 / 256  # powers of two: steps and products are exact, so any error is the engine's


def probe() -> dict[str, float]:
    """{error: rms difference from exact arithmetic / std of the exact result, int8_ops: operators that ran in INT8}.

    The first row and column are all 127: their sum overflows the 16 bits in which CPUs without VNNI add products.
    """
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (ROWS, IN))
    weight = rng.integers(-127, 128, (IN, OUT))
    x[0], weight[:, 0] = 127, 127
    exact = (x @ weight) * (INPUT_STEP * WEIGHT_STEP)
    inputs = {"x": (x * INPUT_STEP).astype(np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        _compile(weight, Path(folder))
        model, params = Path(folder, artifact.MODEL), Path(folder, artifact.PARAMS)
        config = paddle.inference.Config(str(model), str(params))
        config.disable_gpu()
        config.disable_glog_info()
        config.enable_mkldnn()
        predictor = paddle.inference.create_predictor(config)
        predictor.get_input_handle("x").copy_from_cpu(inputs["x"])
        predictor.run()
        found = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
        ops = int8_ops_run(model, params, inputs)
    return {"error": float(np.sqrt(np.mean((found - exact) ** 2)) / exact.std()), "int8_ops": ops}


def _compile(weight: np.ndarray, folder: Path) -> None:
    linear = paddle.nn.Linear(IN, OUT)
    linear.weight.set_value((weight * WEIGHT_STEP).astype(np.float32))
    linear.bias.set_value(np.zeros(OUT, np.float32))
    grid = LayerGrid(np.full(1, WEIGHT_STEP, np.float32), 8, INPUT_STEP, 8)
    program.save_fp32(linear, folder / "fp32", [paddle.static.InputSpec([None, IN], "float32", name="x")])
    program.compile_int8(folder / "fp32", folder / artifact.MODEL.partition(".")[0], {linear.weight.name: grid})


if __name__ == "__main__":
    print(json.dumps(probe()))
