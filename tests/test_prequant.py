"""PreQuant: what is chosen, what stays bit for bit, and what is deployed."""

import numpy as np
import pytest
from test_trainer import same, settings, weights_of

from ernie_kqat import KurtosisQAT, UserError, config
from ernie_kqat.evaluate import logits_of
from ernie_kqat.methods.prequant import FixedStep, PreQuant, largest
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.quantizers import numeric
from ernie_kqat.quantizers.attach import quantized_linears
from ernie_kqat.restore import restore_run
from ernie_kqat.run_folder import RunFolder
from ernie_kqat.trainer import Trainer, train

QUANT = {"quant": {"weight": {"bits": 4, "range": "mse"}}}
DECAYED = {"epochs": 2, "weight_decay": 0.5, "select": "last"}
LEARNS = {"epochs": 8, "learning_rate": 1e-2}  # embeddings are frozen, and a random encoder has little to correct


def trained(tmp_path, tiny_ernie, tiny_task, name="run", before=None, train=DECAYED, **slim):
    made = settings(tmp_path, tiny_ernie, tiny_task, name, Slim={**QUANT, **slim}, Train=train)
    one = Trainer(made, RunFolder(tmp_path / name, made))
    if before:
        before(one.model)
    one.folder.open()
    one.run(False)
    return one


def encoder(model):
    return {name: layer for name, layer in quantized_linears(model).items() if ".encoder." in name}


def test_the_largest_errors_are_chosen():
    errors = np.random.default_rng(0).random((30, 7)).astype(np.float32)
    chosen = largest(errors, 0.1)
    assert chosen.sum() == 21
    assert errors[chosen].min() > errors[~chosen].max()
    assert largest(np.ones((2, 3)), 0.5).tolist() == [[True, True, True], [False, False, False]]
    assert largest(errors, 1.0).all()
    assert not largest(errors, 0.0).any()


def test_training_moves_what_was_chosen_and_leaves_the_rest_bit_for_bit(tmp_path, tiny_ernie, tiny_task):
    plain = load_classifier(str(tiny_ernie), 2)
    start = {name: value.numpy() for name, value in plain.state_dict().items()}
    KurtosisQAT({"weight_bits": 4, "weight_range": "mse"}).quantize(plain)
    quantized = {name: layer._fake_quant_weight(layer.weight).numpy() for name, layer in encoder(plain).items()}
    one = trained(tmp_path, tiny_ernie, tiny_task, prequant={"share": 0.05})
    assert len(encoder(one.model)) == 12
    for name, layer in encoder(one.model).items():
        before, after = start[f"{name}.weight"], layer.weight.numpy()
        step = numeric.mse_range(before, 4, "channel") / 7
        on_grid = quantized[name]
        np.testing.assert_allclose(on_grid, numeric.on_grid(before, step, 7), rtol=1e-6)
        chosen = largest(np.abs(before - on_grid), 0.05)
        assert chosen.sum() == round(0.05 * before.size)
        np.testing.assert_array_equal(after[~chosen], on_grid[~chosen])
        assert (after != np.clip(before, -7 * step, 7 * step))[chosen].mean() > 0.9
        assert not layer.weight.grad.numpy()[~chosen].any()  # they play no part in the clipped norm
        integers, deployed_step = layer._fake_quant_weight.integers(layer.weight)
        np.testing.assert_allclose(deployed_step, step, rtol=1e-6)
        np.testing.assert_array_equal(integers[~chosen], numeric.integers(before, step, 7)[~chosen])
        flipped = integers != numeric.integers(before, step, 7)
        assert 0.1 < flipped.sum() / chosen.sum() < 0.9
    moved = {name for name, value in one.model.named_parameters() if (value.numpy() != start[name]).any()}
    frozen = {name for name in start if ".embeddings." in name and "norm" not in name}
    keys = {name for name in start if "k_proj.bias" in name}  # softmax does not see them: their gradient is rounding
    assert len(frozen) == 3
    assert moved | keys == set(start) - frozen


def test_of_all_weights_it_is_qat_on_fixed_steps(tmp_path, tiny_ernie, tiny_task):
    def by_hand(model):
        for layer in encoder(model).values():
            layer._fake_quant_weight = FixedStep(layer._fake_quant_weight, layer.weight)
            limit = 7 * layer._fake_quant_weight.step().numpy()
            layer.weight.set_value(np.clip(layer.weight.numpy(), -limit, limit))
        for name, parameter in model.named_parameters():
            parameter.stop_gradient |= ".embeddings." in name and parameter.ndim > 1

    trained(tmp_path, tiny_ernie, tiny_task, "all", prequant={"share": 1.0})
    trained(tmp_path, tiny_ernie, tiny_task, "hand", by_hand)
    ours, theirs = weights_of(tmp_path / "all"), weights_of(tmp_path / "hand")
    # By hand they were frozen after AdamW had made their moments.
    same(ours, {name: value for name, value in theirs.items() if name in ours or not name.startswith("optimizer/")})


def test_it_learns_and_is_deployed_exactly(tmp_path, tiny_ernie, tiny_task, monkeypatch):
    from ernie_kqat.export import verify
    from ernie_kqat.export.exporter import export_run

    monkeypatch.setattr(verify, "LATENCY_S", 0.1)
    one = trained(tmp_path, tiny_ernie, tiny_task, prequant={"share": 0.3}, train=LEARNS)
    assert one.progress.best_scores["accuracy"] > one.progress.fp32_start + 0.15
    found = export_run(str(tmp_path / "run"), str(tmp_path / "out"), config.Export())["verification"]
    assert found["passed"]
    assert found["simulated_accuracy"] == one.progress.best_scores["accuracy"]


def test_its_last_model_is_restored_bit_for_bit(tmp_path, tiny_ernie, tiny_task):
    one = trained(tmp_path, tiny_ernie, tiny_task, prequant={})
    restored = restore_run(tmp_path / "run")
    np.testing.assert_array_equal(logits_of(restored.model, one.data.dev, 0), logits_of(one.model, one.data.dev, 0))


def test_a_resumed_run_goes_on_exactly(tmp_path, tiny_ernie, tiny_task):
    slim = {**QUANT, "prequant": {"share": 0.05}}
    train(settings(tmp_path, tiny_ernie, tiny_task, "whole", Slim=slim, Train={"max_steps": 4}))
    made = settings(tmp_path, tiny_ernie, tiny_task, "cut", Slim=slim, Train={"max_steps": 4, "save_steps": 2})
    one = Trainer(made, RunFolder(tmp_path / "cut", made))
    one.folder.open()
    save = one._save
    one._save = lambda: save() if one.progress.step == 2 else None
    one.run(False)
    train(made, resume=True)
    same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))


def test_mistakes_are_named(tiny_ernie):
    with pytest.raises(UserError, match="Slim.prequant: needs a quantized encoder; say Slim.quant"):
        PreQuant().attach(load_classifier(str(tiny_ernie), 2), dict)
    ternary = config.Quant(config.WeightQuant(quantizer="ternary", bits=2))
    model = KurtosisQAT.from_options(ternary).quantize(load_classifier(str(tiny_ernie), 2))
    with pytest.raises(UserError, match="q_proj: quantizer ternary has no step to hold; say minmax or lsq"):
        PreQuant().prepare(model)
