"""An ERNIE as a chain of blocks (encoder layers, then the head), for methods that work through it in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle.nn.quant.quant_layers import QuantizedLinear

from . import tasks
from .methods import Batch
from .models.heads import head_of
from .quantizers.attach import quantized_linears


@dataclass(frozen=True)
class Block:
    """run: hidden states [rows, tokens, width] and attention mask -> the next hidden states, or the head's logits; linears: its
    quantized layers by their names in the model, in the order in which they compute."""

    run: Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor]
    linears: dict[str, QuantizedLinear]


def blocks_of(model: paddle.nn.Layer) -> list[Block]:
    """The encoder layers and the head of an ERNIE."""
    linears = quantized_linears(model)
    encoder = "ernie.encoder.layers."

    def layer(index: int) -> Block:
        own = {name: found for name, found in linears.items() if name.startswith(f"{encoder}{index}.")}
        return Block(lambda hidden, mask: model.ernie.encoder.layers[index](hidden, src_mask=mask), own)

    head = {name: found for name, found in linears.items() if not name.startswith(encoder)}
    of_hidden = head_of(model)
    last = Block(lambda hidden, mask: of_hidden(hidden), head)
    return [*map(layer, range(len(model.ernie.encoder.layers))), last]


class Stream:
    """Batches on their way through a model in eval mode: what the next block is given of each.

    hidden: [rows, tokens, width]; masks: what the encoder adds to attention scores; real: bool [rows, tokens], not padding;
    task: the model's.
    """

    @paddle.no_grad()
    def __init__(self, model: paddle.nn.Layer, batches: Sequence[Batch]):
        self.hidden, self.masks, self.real = [], [], []
        self.task = tasks.of_model(model)
        for batch in batches:
            ids, types = (paddle.to_tensor(batch[name]) for name in ("input_ids", "token_type_ids"))
            real = batch["input_ids"] != model.ernie.pad_token_id
            self.hidden.append(model.ernie.embeddings(input_ids=ids, token_type_ids=types))
            self.masks.append(paddle.to_tensor(np.float32(-1e4) * ~real).unsqueeze([1, 2]))
            self.real.append(real)

    @paddle.no_grad()
    def outputs(self, block: Block) -> list[paddle.Tensor]:
        """What the block makes of each batch."""
        return [block.run(hidden, mask) for hidden, mask in zip(self.hidden, self.masks)]

    def through(self, block: Block) -> None:
        """Go on to the next block."""
        self.hidden = self.outputs(block)
