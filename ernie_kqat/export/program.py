"""A quantized model -> a Paddle Inference INT8 program that computes exactly what was trained.

Paddle's own load-time INT8 path takes `fc` weight scales over the wrong elements and says nothing (docs/decisions/0001).
So the program is compiled ahead of time, by Paddle's own passes but with OUR scales, from an fp32 program whose weights
already lie on their integer grids. The saved file, with these weights as int8, needs only `Config.enable_mkldnn()`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import paddle
from paddle.base import core
from paddle.base.framework import IrGraph

from .. import config
from ..errors import UserError
from ..quantizers.attach import LayerGrid, deployable
from .integers import store_integers
from .rewrites import ALL, rewrite_model, rewrite_program

# Of a program's file to another's, with the grids by weight parameter name; of a loaded program and its parameters.
Compiler = Callable[[Path, Path, dict[str, LayerGrid]], None]
Change = Callable[[paddle.static.Program, core.Scope], paddle.static.Program]

ENGINE_QMAX = 127  # the engine's scales are 127 / range at any bit width; giving 1 / (127 x step) keeps our integers


def default_spec() -> list[paddle.static.InputSpec]:
    """int64 input_ids and token_type_ids, [batch, tokens] of any size."""
    return [paddle.static.InputSpec([None, None], "int64", name=name) for name in ("input_ids", "token_type_ids")]


def save_fp32(model: paddle.nn.Layer, path: Path, input_spec: list | None = None) -> None:
    """Write the plain fp32 inference program of an unquantized model to `path`.pdmodel and .pdiparams.

    UserError for a layer that says it is `simulated_only`: it computes what Paddle Inference cannot.
    """
    for name, layer in model.named_sublayers():
        if hasattr(layer, "simulated_only"):
            raise UserError(f"{name}: {layer.simulated_only}; nothing is exported")
    model.eval()
    with quiet():
        static = paddle.jit.to_static(model, input_spec=input_spec or default_spec(), full_graph=True)
        paddle.jit.save(static, str(path))
    path.with_name(f"{path.name}.pdiparams.info").unlink(
        missing_ok=True
    )  # training metadata; inference has no use for it


def save_int8(
    model: paddle.nn.Layer, path: Path, input_spec: list | None = None, rewrites: config.Rewrites = ALL
) -> None:
    """Write the oneDNN INT8 program of a quantized model; both files appear whole or not at all."""

    def compiler(source: Path, target: Path, grids: dict[str, LayerGrid]) -> None:
        compile_int8(source, target, grids, rewrites)

    save_quantized(model, path, compiler, input_spec, rewrites)


def save_quantized(
    model: paddle.nn.Layer,
    path: Path,
    compiler: Compiler,
    input_spec: list | None = None,
    rewrites: config.Rewrites | None = None,
) -> dict[str, LayerGrid]:
    """Write what `compiler` makes of a quantized model's plain program, as `save_int8` does. Returns the layers' grids."""
    plain, grids = deployable(model)
    if rewrites is not None:
        rewrite_model(plain, rewrites)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        save_fp32(plain, Path(folder, "fp32"), input_spec)
        compiler(Path(folder, "fp32"), Path(folder, "compiled"), grids)
        for suffix in (".pdmodel", ".pdiparams"):
            shutil.move(str(Path(folder, f"compiled{suffix}")), path.with_name(path.name + suffix))
    return grids


def names(path: Path) -> tuple[list[str], str]:
    """Names of a saved program's inputs, in order, and of its one output."""
    with static_mode():
        block = paddle.static.deserialize_program(path.with_name(f"{path.name}.pdmodel").read_bytes()).global_block()
    feeds = sorted((op.attr("col"), op.output("Out")[0]) for op in block.ops if op.type == "feed")
    (output,) = [op.input("X")[0] for op in block.ops if op.type == "fetch"]
    return [name for _, name in feeds], output


def compile_int8(source: Path, target: Path, grids: dict[str, LayerGrid], rewrites: config.Rewrites = ALL) -> None:
    """fp32 program with on-grid weights -> INT8 program. `grids` is keyed by weight parameter name.

    A Linear without a grid stays in fp32. Raises RuntimeError if a grid finds no `fc` of its name: an internal error,
    because the program would silently compute that layer in fp32.
    """

    def change(program: paddle.static.Program, scope: core.Scope) -> paddle.static.Program:
        graph = IrGraph(core.Graph(program.desc), for_test=True)
        graph.graph.set_not_owned("__param_scope__", scope)
        _fuse_linears(graph)
        _quantize(graph, _scales(graph, grids))
        compiled = graph.to_program()
        rewrite_program(compiled, rewrites)
        store_integers(compiled, scope)
        return compiled

    rewrite(source, target, change)


def rewrite(source: Path, target: Path, change: Change) -> None:
    """Save as `target` what `change` makes of the program `source` and of its parameters in a scope."""
    with static_mode(), quiet():
        scope = core.Scope()
        with paddle.static.scope_guard(scope):
            executor = paddle.static.Executor(paddle.CPUPlace())
            program, feeds, fetches = paddle.static.load_inference_model(str(source), executor)
            outputs = [_without_scale(program.global_block(), fetch.name) for fetch in fetches]
            changed = change(program, scope)
            block = changed.global_block()
            paddle.static.save_inference_model(
                str(target),
                [block.var(name) for name in feeds],
                [block.var(name) for name in outputs],
                executor,
                program=changed,
                clip_extra=False,  # else a fused activation is lost, and nothing says so
            )


def _without_scale(block: paddle.static.Block, output: str) -> str:
    """Take out the multiplication by 1 that Paddle saves before each output, and return what it multiplied.

    Saving again adds one of the same name. Beside the first it would overwrite its own input, which TensorRT refuses.
    """
    (at,) = [index for index, op in enumerate(block.ops) if op.type == "scale" and op.output("Out") == [output]]
    scaled = block.ops[at].input("X")[0]
    block._remove_op(at)
    return scaled


def _apply(graph: IrGraph, name: str, **attributes) -> None:
    one = core.get_pass(name)
    for key, value in attributes.items():
        one.set(key, value)
    one.apply(graph.graph)


def _fuse_linears(graph: IrGraph) -> None:
    _apply(graph, "mkldnn_placement_pass", mkldnn_enabled_op_types=set())
    _apply(graph, "is_test_pass")
    _apply(graph, "simplify_with_basic_ops_pass")
    _apply(graph, "gpu_cpu_map_matmul_v2_to_mul_pass")
    _apply(graph, "fc_fuse_pass", use_gpu=False, use_fc_padding=False)
    _apply(graph, "fc_mkldnn_pass")


def _scales(graph: IrGraph, grids: dict[str, LayerGrid]) -> dict:
    scales: dict[str, tuple] = {}
    steps: dict[str, float] = {}
    found = set()
    for node in graph.all_op_nodes():
        if node.op().type() != "fc":
            continue
        weight, source = node.op().input("W")[0], node.op().input("Input")[0]
        if weight not in grids:
            continue
        grid = grids[weight]
        width = node.op().block().find_var(weight.encode()).shape()[1]
        scales[weight] = _scale(1.0 / (ENGINE_QMAX * np.broadcast_to(grid.weight_step.astype(np.float64), [width])))
        # Layers that read one tensor share its quantize operator, so they must agree on its step.
        if steps.setdefault(source, grid.activation_step) != grid.activation_step:
            raise UserError(
                f"layers that read the same tensor have different activation ranges (steps {steps[source]:.6g} and"
                f" {grid.activation_step:.6g}); give them one activation rule in Slim.quant.layers"
            )
        scales[source] = _scale(1.0 / (ENGINE_QMAX * grid.activation_step))
        found.add(weight)
    if found != set(grids):
        raise RuntimeError(f"no fc operator for {sorted(set(grids) - found)}: the graph was not fused as expected")
    return scales


def _scale(values) -> tuple:
    tensor = core.LoDTensor()
    tensor.set(np.ascontiguousarray(np.atleast_1d(np.asarray(values, np.float64))), core.CPUPlace())
    return False, tensor  # False: signed


def _quantize(graph: IrGraph, scales: dict) -> None:
    _apply(graph, "cpu_quantize_placement_pass", quantize_enabled_op_types={"fc"})
    _apply(graph, "cpu_quantize_pass", quant_var_scales=scales, data_layout="NCHW")
    _apply(graph, "cpu_quantize_squash_pass")
    _apply(graph, "int8_scale_calculation_mkldnn_pass")
    _apply(graph, "params_quantization_mkldnn_pass")


@contextlib.contextmanager
def static_mode() -> Iterator[None]:
    """Paddle's static mode inside, the mode that was outside after it."""
    dynamic = paddle.in_dynamic_mode()
    paddle.enable_static()
    try:
        yield
    finally:
        if dynamic:
            paddle.disable_static()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Paddle's C++ passes print (100 lines an export) unless the export fails: then it is shown."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        saved = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in saved:
                os.dup2(kept.fileno(), number)
            yield
        except BaseException:
            kept.seek(0)
            os.write(saved[2], kept.read())
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, original in saved.items():
                os.dup2(original, number)
                os.close(original)
