"""PaddleSlim's own INT8 export, as its documentation says, of a model that is calibrated and not trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import paddleslim

from ..data.batching import collate
from ..data.dataset import Split
from ..export.program import default_spec, quiet
from ..restore import restore_folder

BATCH_SIZE = 32


class _Masked(paddle.nn.Layer):
    """ERNIE with the mask given: without one its forward reads a weight that PaddleSlim's wrapper hides."""

    def __init__(self, model: paddle.nn.Layer, pad_token_id: int):
        super().__init__()
        self.model, self.pad_token_id = model, pad_token_id

    def forward(self, input_ids, token_type_ids):
        mask = (input_ids == self.pad_token_id).astype("float32").unsqueeze([1, 2]) * -1e4
        return self.model(input_ids, token_type_ids, attention_mask=mask)


def export(model: str, calibration: Split, folder: Path) -> None:
    """Write FOLDER/inference.pdmodel and .pdiparams: 8-bit weights per output channel, moving-average activations."""
    restored = restore_folder(model)
    masked = _Masked(restored.model, restored.pad_token_id)
    config = {
        "weight_quantize_type": "channel_wise_abs_max",
        "activation_quantize_type": "moving_average_abs_max",
        "quantizable_layer_type": ["Linear"],
        "onnx_format": True,
    }
    qat = paddleslim.QAT(config)
    masked = qat.quantize(masked, inplace=True)
    masked.train()  # the ranges move in train mode only
    for layer in masked.sublayers():
        if isinstance(layer, paddle.nn.Dropout):
            layer.p = 0.0
    with paddle.no_grad():
        for start in range(0, len(calibration), BATCH_SIZE):
            rows = np.arange(start, min(start + BATCH_SIZE, len(calibration)))
            batch = collate(calibration, rows, restored.pad_token_id)
            masked(paddle.to_tensor(batch["input_ids"]), paddle.to_tensor(batch["token_type_ids"]))
    masked.eval()
    folder.mkdir(parents=True)
    with quiet():
        qat.save_quantized_model(masked, str(folder / "inference"), input_spec=default_spec())
