"""Bias correction: take out of each bias by how much quantization moves the mean of its layer's output.

Paper: Nagel et al., arXiv 1906.04721, section 4.2 and appendix D (the empirical version):

    b <- b - (E[y_quantized] - E[y])

from the first layer to the last, each with all before it quantized and corrected. y is what the fp32 model computes there.

Differs from the paper: E is over the real tokens of the calibration rows; padding is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle

from ..blocks import Block, Stream, blocks_of
from ..errors import UserError
from ..quantizers.attach import input_of, quantized_linears
from . import Method


@dataclass
class BiasCorrection(Method):
    """No keys: `Slim.bias_correction: {}`. Methods that change weights stand before it in the config."""

    def attach(self, model, pretrained):
        if not quantized_linears(model):
            raise UserError("Slim.bias_correction: needs quantized layers; say Slim.quant")

    def after_calibration(self, model, fp32, batches):
        own, exact = Stream(model, batches), Stream(fp32, batches)
        for block, reference in zip(blocks_of(model), blocks_of(fp32)):
            wanted = mean_outputs(exact, reference, list(reference.linears))
            for names in _at_once(list(block.linears)):
                found = mean_outputs(own, block, names)
                for name in names:
                    bias = block.linears[name].bias
                    bias.set_value(bias.numpy() - (found[name] - wanted[name]).astype(np.float32))
            own.through(block)
            exact.through(reference)

    def plan(self):
        return ["bias correction"]


@paddle.no_grad()
def mean_outputs(stream: Stream, block: Block, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Mean output of each named Linear of the block over all real tokens of the stream, float64 [out]."""
    outputs: dict[str, paddle.Tensor] = {}

    def into(name: str):
        def hook(layer, inputs, output):
            outputs[name] = output

        return hook

    hooks = [block.linears[name].register_forward_post_hook(into(name)) for name in names]
    sums: dict[str, np.ndarray] = dict.fromkeys(names, np.zeros(()))
    counts = dict.fromkeys(names, 0)
    for hidden, mask, real in zip(stream.hidden, stream.masks, stream.real):
        block.run(hidden, mask)
        for name, output in outputs.items():
            values = output.numpy()[real] if output.ndim == 3 else output.numpy()  # the head's are one row a sentence
            sums[name] = sums[name] + values.sum(axis=0, dtype=np.float64)
            counts[name] += len(values)
    for hook in hooks:
        hook.remove()
    return {name: sums[name] / counts[name] for name in names}


def _at_once(names: Sequence[str]) -> list[list[str]]:
    """Layers in order, those that read one tensor together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(input_of(name), []).append(name)
    return list(groups.values())
