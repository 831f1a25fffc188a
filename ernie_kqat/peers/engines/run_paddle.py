"""Paddle Inference: our artifacts in FOLDER/fp32 and FOLDER/int8, and PaddleSlim's own export in FOLDER/paddleslim."""

import importlib.metadata
from pathlib import Path

import numpy as np
import worker

from ernie_kqat.predictor import Predictor

OURS = {"paddle fp32": ("fp32", "paddle"), "ours plain": ("int8", "paddle"), "ours native": ("int8", "native")}


def load(engine: str, folder: str, threads: int):
    versions = {"paddlepaddle": importlib.metadata.version("paddlepaddle")}
    if engine == "paddleslim int8":
        return _paddleslim(Path(folder, "paddleslim"), threads), versions
    name, which = OURS[engine]
    predictor = Predictor(Path(folder, name), threads, allow_unverified=True, engine=which)
    return lambda rows: predictor.logits(rows, len(rows)), versions


def _paddleslim(folder: Path, threads: int):
    """Its quantized program, as its documentation runs it, but with every shape's primitives kept, as we keep them."""
    import paddle.inference

    from ernie_kqat import shapes

    config = paddle.inference.Config(str(folder / "inference.pdmodel"), str(folder / "inference.pdiparams"))
    config.disable_gpu()
    config.disable_glog_info()
    config.enable_mkldnn()
    config.enable_mkldnn_int8()
    config.set_mkldnn_cache_capacity(0)
    config.set_cpu_math_library_num_threads(threads)
    config.enable_memory_optim()
    predictor = paddle.inference.create_predictor(config)
    inputs = [predictor.get_input_handle(name) for name in ("input_ids", "token_type_ids")]
    output = predictor.get_output_handle(predictor.get_output_names()[0])

    def answer(rows: list) -> np.ndarray:
        batch = shapes.pad(rows, 0, 512)
        for handle, ids in zip(inputs, batch):
            handle.copy_from_cpu(ids)
        predictor.run()
        return output.copy_to_cpu()[: len(rows)]

    return answer


if __name__ == "__main__":
    worker.serve(load)
