"""A quantized ERNIE classifier -> the arrays that the native operator computes with: the same integers, steps and biases.

The layout is that of ernie_kqat/native/encoder.h: widths padded with zeros to multiples of 64, attention heads to multiples of
16, weights in panels of 16 output channels, so that the operator uses the arrays as they lie in the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle

from .. import native
from ..errors import UserError
from ..models.heads import reads_first_token
from ..quantizers import numeric
from ..quantizers.attach import FittedLinear, LayerGrid, deployable
from ..quantizers.attention import AttentionGrid, DeployedAttention
from .integers import integers_of
from .program import static_mode

LANES, WIDTH = 16, 64
ACTIVATIONS = {"gelu": 1, "relu": 2}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
FLOAT, INT8, SMOOTHED, SMOOTHED_ALIKE = range(4)  # encoder.h's Exact


@dataclass
class Contents:
    """`shape`, `exact`, `rounding`, `epsilon`: see encoder.h. The lists of arrays are flat, in the operator's order.

    `words`: float32, or int8 where they are low-bit.
    """

    shape: list[int]
    words: np.ndarray
    places: np.ndarray
    kinds: np.ndarray
    exact: list[int] = field(default_factory=list)
    rounding: list[float] = field(default_factory=list)
    epsilon: list[float] = field(default_factory=list)
    integers: list[np.ndarray] = field(default_factory=list)
    floats: list[np.ndarray] = field(default_factory=list)
    shifts: list[np.ndarray] = field(default_factory=list)

    def flat(self) -> dict[str, np.ndarray]:
        """The arrays by name, one dimension each but for the tables."""
        return {
            "words": self.words,
            "places": self.places,
            "kinds": self.kinds,
            "integers": _joined(self.integers, np.int8),
            "floats": _joined(self.floats, np.float32),
            "shifts": _joined(self.shifts, np.int32),
        }


def contents(model: paddle.nn.Layer) -> Contents:
    """Of a quantized ErnieForSequenceClassification. Raises UserError for what the operator cannot compute."""
    if not reads_first_token(model):
        raise UserError("Export.engine: native: the operator answers from [CLS]; the model judges every token")
    plain, grids = deployable(model)
    ernie, layers = plain.ernie, list(plain.ernie.encoder.layers)
    hidden = ernie.embeddings.word_embeddings.weight.shape[1]
    heads = layers[0].self_attn.num_heads
    packer = _Packer(grids, hidden, heads, hidden // heads)
    found = Contents(
        [
            hidden,
            heads,
            hidden // heads,
            layers[0].linear1.weight.shape[1],
            plain.classifier.weight.shape[1],
            len(layers),
            _activation(layers),
            ernie.pad_token_id,
        ],
        *_tables(ernie.embeddings),
    )
    grids_of_attention = [_attention_grid(layer.self_attn) for layer in layers]
    if grids_of_attention[0] is not None:
        found.shape.append(grids_of_attention[0].bits)
    packer.words(found)
    packer.norm(found, ernie.embeddings.layer_norm)
    for layer, grid in zip(layers, grids_of_attention):
        attention = layer.self_attn
        if grid is not None:
            found.floats.append(np.array([grid.query, grid.key, grid.value], np.float32))
        for name in PROJECTIONS:
            packer.linear(found, getattr(attention, name), split=grid is None and name == "q_proj", to_heads=True)
        packer.linear(found, attention.out_proj, from_heads=True)
        packer.norm(found, layer.norm1)
        packer.linear(found, layer.linear1)
        packer.linear(found, layer.linear2)
        packer.norm(found, layer.norm2)
    packer.linear(found, ernie.pooler.dense)
    packer.linear(found, plain.classifier)
    return found


def _attention_grid(attention) -> AttentionGrid | None:
    return attention.grid if isinstance(attention, DeployedAttention) else None


def _activation(layers: list) -> int:
    names = {layer.activation.__name__ for layer in layers}
    if len(names) != 1 or not names <= set(ACTIVATIONS):
        raise UserError(
            f"Export.engine: native: activation {', '.join(sorted(names))}; it has {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[names.pop()]


def _tables(embeddings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words, positions and token types; the one task type that ERNIE 2 and 3 add to every token goes into the positions."""
    places = embeddings.position_embeddings.weight.numpy()
    if embeddings.use_task_id:
        places = places + embeddings.task_type_embeddings.weight.numpy()[embeddings.task_id]
    if embeddings.type_vocab_size > 0:
        kinds = embeddings.token_type_embeddings.weight.numpy()
    else:
        kinds = np.zeros((1, places.shape[1]), np.float32)
    return embeddings.word_embeddings.weight.numpy(), places, kinds


@dataclass
class _Packer:
    grids: dict[str, LayerGrid]
    hidden: int
    heads: int
    head_width: int
    smoothing: np.ndarray | None = None  # of the last Linear that has any

    def words(self, to: Contents) -> None:
        """As int8 where they lie on the grids of their rows; the steps are the first floats then."""
        q, step = integers_of(to.words) or (to.words, np.zeros(2))
        if step.ndim == 2 or step.size == 1:
            to.words = q
            to.floats.append(np.broadcast_to(step.reshape(-1), [len(q)]))

    def norm(self, to: Contents, layer: paddle.nn.LayerNorm) -> None:
        to.epsilon.append(float(layer._epsilon))
        to.floats += [_padded(layer.weight.numpy(), WIDTH), _padded(layer.bias.numpy(), WIDTH)]

    def linear(
        self, to: Contents, layer, split: bool = False, to_heads: bool = False, from_heads: bool = False
    ) -> None:
        """`split`: times 1 / sqrt(head width), which attention wants of its queries."""
        factor = np.float32(self.head_width**-0.5 if split else 1)
        weight = layer.weight.numpy()
        bias = np.zeros(weight.shape[1], np.float32) if layer.bias is None else layer.bias.numpy()
        grid = self.grids.get(layer.weight.name)
        smoothing = _smoothing(layer)
        to.exact.append(self._kind(to, grid, smoothing, from_heads))
        to.rounding += _rounding(layer, grid)
        if grid is None:
            to.floats.append(_panels(self._placed(weight * factor, to_heads, from_heads), 1))
        else:
            width = weight.shape[1]
            step = np.broadcast_to(grid.weight_step.astype(np.float64), [width])
            q = np.rint(weight / step)
            whole, rest = numeric.whole_steps(_offset(layer), grid.activation_step)
            if isinstance(layer, FittedLinear):  # its offset, but for the rest, is in the shifts: they are exact
                bias = layer.own_bias + rest * step * q.sum(axis=0)
            q = self._placed(q, to_heads, from_heads).astype(np.int8)
            steps = (step * grid.activation_step * factor).astype(np.float32)
            to.integers.append(_panels(q, 4))
            to.shifts.append((128 - whole) * q.sum(axis=0, dtype=np.int32))
            to.floats.append(self._placed(steps[None], to_heads, False, rows=False)[0])
        to.floats.append(self._placed((bias * factor)[None], to_heads, False, rows=False)[0])

    def _kind(self, to: Contents, grid: LayerGrid | None, smoothing: np.ndarray | None, from_heads: bool) -> int:
        """A value of encoder.h's Exact; smoothing that the Linear before has not got goes to the floats."""
        if grid is None:
            return FLOAT
        if smoothing is None:
            return INT8
        if from_heads:
            raise UserError("Export.engine: native: it smooths no attention output; let its factors go into the values")
        if self.smoothing is not None and np.array_equal(self.smoothing, smoothing):
            return SMOOTHED_ALIKE
        self.smoothing = smoothing
        to.floats.append(_padded(smoothing, WIDTH))
        return SMOOTHED

    def _placed(self, matrix: np.ndarray, to_heads: bool, from_heads: bool, rows: bool = True) -> np.ndarray:
        """The matrix with its columns (and rows) padded, and where they are heads, each head."""
        if to_heads:
            matrix = self._by_head(matrix)
        if from_heads:
            matrix = self._by_head(matrix.T).T
        matrix = _padded(matrix, WIDTH)
        return _padded(matrix.T, WIDTH).T if rows else matrix

    def _by_head(self, matrix: np.ndarray) -> np.ndarray:
        """[n, heads x head width] -> [n, heads x padded head width]."""
        split = matrix.reshape(len(matrix), self.heads, self.head_width)
        return _padded(split, LANES).reshape(len(matrix), -1)


def _rounding(layer, grid: LayerGrid | None) -> list[float]:
    """1 / step, offset and bounds of the input, in the integers of encoder.h."""
    if grid is None:
        return [1.0, 0.0, 0.0, 0.0]
    high = numeric.qmax(grid.activation_bits)
    return [float(np.float32(1) / np.float32(grid.activation_step)), _offset(layer), float(-high - 1), float(high)]


def _offset(layer) -> float:
    return float(layer.fit.offset) if isinstance(layer, FittedLinear) else 0.0


def _smoothing(layer) -> np.ndarray | None:
    """What each feature of the layer's input is multiplied by, [in]."""
    smoothing = layer.fit.smoothing if isinstance(layer, FittedLinear) else None
    return None if smoothing is None else smoothing.factor.numpy()


def _padded(values: np.ndarray, multiple: int) -> np.ndarray:
    """The last axis padded with zeros to a multiple."""
    missing = -values.shape[-1] % multiple
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


def _panels(matrix: np.ndarray, together: int) -> np.ndarray:
    """[in, out] -> flat [out / 16][in / together][16][together]."""
    rows, columns = matrix.shape
    split = matrix.reshape(rows // together, together, columns // LANES, LANES)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1)).reshape(-1)


def _joined(arrays: list[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(array.astype(dtype).reshape(-1) for array in arrays)])


def save(model: paddle.nn.Layer, path: Path) -> None:
    """Write the program of the one operator to `path`.pdmodel and .pdiparams; the operator must be loaded."""
    held = contents(model)
    with static_mode():
        scope, program = paddle.static.Scope(), paddle.static.Program()
        with paddle.static.scope_guard(scope), paddle.static.program_guard(program):
            feeds = [paddle.static.data(name, [-1, -1], "int64") for name in ("input_ids", "token_type_ids")]
            block = program.global_block()
            inputs = {"InputIds": feeds[0], "TokenTypeIds": feeds[1]}
            for name, array in held.flat().items():
                inputs[name.capitalize()] = block.create_var(
                    name=name, shape=array.shape, dtype=str(array.dtype), persistable=True, stop_gradient=True
                )
                scope.var(name).get_tensor().set(array, paddle.CPUPlace())
            logits = block.create_var(name="logits", shape=[-1, held.shape[4]], dtype="float32")
            attributes = {name: getattr(held, name) for name in ("shape", "exact", "rounding", "epsilon")}
            block.append_op(type=native.OPERATOR, inputs=inputs, outputs={"Logits": logits}, attrs=attributes)
            executor = paddle.static.Executor(paddle.CPUPlace())
            paddle.static.save_inference_model(str(path), feeds, [logits], executor, program=program)
