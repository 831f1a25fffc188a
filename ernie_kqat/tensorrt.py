"""TensorRT through Paddle Inference: whether this process has it, and the one way in which its programs are configured.

Nothing here has ever run on a GPU (docs/tensorrt.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle.inference
from paddle.base import core

from . import artifact, shapes

ROWS = 32  # of the largest batch that the profile allows
OLDEST = (8, 5, 1)  # Paddle translates quantize and dequantize operators for TensorRT from here on
GPU_MEMORY_MB, WORKSPACE_BYTES = 256, 1 << 30
SMALLEST_SUBGRAPH = 3  # operators; fewer are not worth the way to TensorRT and back
WHEEL = "paddlepaddle-gpu 2.6.2 for CUDA 11.8 (TensorRT 8.5.1) or 12.0 (TensorRT 8.6.1)"


def why_not() -> str:
    """Why TensorRT programs cannot run in this process; "" if they can."""
    compiled = tuple(paddle.inference.get_trt_compile_version())
    if not core.is_compiled_with_cuda() or not any(compiled):
        return f"this Paddle was built without TensorRT; install {WHEEL}, built with TensorRT"
    if compiled < OLDEST:
        return f"this Paddle was built with TensorRT {_dotted(compiled)}; install {WHEEL}"
    if not any(paddle.inference.get_trt_runtime_version()):
        return f"TensorRT's libraries are not found; install TensorRT {_dotted(compiled)}, with which this Paddle was built"
    if core.get_cuda_device_count() < 1:
        return "Paddle sees no GPU here"
    return ""


def configure(config: paddle.inference.Config, folder: Path) -> None:
    """Make `config` run the QDQ program of an artifact folder in TensorRT; `why_not` must have no reason.

    Explicit quantization keeps the program's quantize and dequantize operators; without it Paddle removes them and TensorRT
    chooses what runs in INT8. Shapes beyond the profile fail: building an engine for them would change the artifact's files.
    """
    config.enable_use_gpu(GPU_MEMORY_MB, 0, paddle.inference.PrecisionType.Float32)
    config.enable_memory_optim()
    config.enable_tensorrt_engine(
        workspace_size=WORKSPACE_BYTES,
        max_batch_size=ROWS,
        min_subgraph_size=SMALLEST_SUBGRAPH,
        precision_mode=paddle.inference.PrecisionType.Int8,
        use_static=False,
        use_calib_mode=False,
    )
    config.enable_tensorrt_explicit_quantization()
    config.enable_tuned_tensorrt_dynamic_shape(str(folder / artifact.SHAPES), False)


def configure_reference(config: paddle.inference.Config) -> None:
    """Make `config` run a QDQ program operator by operator as it is written, on the CPU: what verification compares."""
    config.disable_gpu()
    config.switch_ir_optim(False)


def collect_shapes(folder: Path, lengths: Sequence[int], max_length: int) -> None:
    """Write the profile of an artifact folder's QDQ program: the least, the largest and the commonest shape of every tensor.

    lengths: tokens of each row of some data. From one row of the fewest tokens that a batch can have to ROWS rows of
    `max_length`; commonest: ROWS rows of the data's median length. Paddle records the shapes as it runs the program, here on
    the CPU.
    """
    config = paddle.inference.Config(str(folder / artifact.MODEL), str(folder / artifact.PARAMS))
    configure_reference(config)
    config.disable_glog_info()
    config.collect_shape_range_info(str(folder / artifact.SHAPES))
    predictor = paddle.inference.create_predictor(config)
    common = shapes.padded_length(int(np.median(lengths)), max_length)
    least = shapes.padded_length(1, max_length)
    for rows, tokens in ((1, least), (ROWS, max_length), (ROWS, common), (ROWS, common)):
        for name in predictor.get_input_names():
            predictor.get_input_handle(name).copy_from_cpu(np.zeros((rows, tokens), np.int64))
        predictor.run()
    del predictor  # writes the file


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
