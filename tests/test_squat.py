"""SQuAT against NumPy float64, switched off, in turns, and its traces: none."""

import json

import numpy as np
import paddle
import pytest
from test_program import OneLinear, calibrated
from test_trainer import LSQ, QAT, same, settings, weights_of

from ernie_kqat import KurtosisQAT, UserError
from ernie_kqat.config import ActivationQuant, Quant, WeightQuant
from ernie_kqat.methods.squat import Perturbation, SQuAT, scaled, sharpness
from ernie_kqat.trainer import Trainer, train

RNG = np.random.default_rng(0)
ROWS, INPUTS, CHANNELS, RHO = 40, 12, 5, 0.3
WEIGHT, WANTED = (RNG.standard_normal((INPUTS, CHANNELS)).astype(np.float32) for _ in range(2))
X = RNG.standard_normal((ROWS, INPUTS)).astype(np.float32)
W2 = Quant(WeightQuant(quantizer="lsq", bits=2), ActivationQuant(quantizer="lsq"))


def model_and_loss(quant=W2):
    """One quantized Linear that is to give X @ WANTED: a quadratic loss, whose gradient NumPy can give anywhere."""
    model = KurtosisQAT.from_options(quant).quantize(OneLinear(WEIGHT, None))
    model = calibrated(model, paddle.to_tensor(X))
    return model, lambda: paddle.nn.functional.mse_loss(model(paddle.to_tensor(X)), paddle.to_tensor(X @ WANTED))


def oracle(model, at):
    """The loss and its gradient at these quantized weights; the inputs on their grid."""
    inputs = model.linear._fake_quant_input(paddle.to_tensor(X)).numpy().astype(np.float64)
    residual = inputs @ at - (X @ WANTED).astype(np.float64)
    return np.square(residual).mean(), 2 * inputs.T @ residual / residual.size


def quantized(model):
    return model.linear._fake_quant_weight(model.linear.weight).numpy().astype(np.float64)


def gradients_of(model, loss):
    def gradients():
        model.clear_gradients()
        value = loss()
        value.backward()
        return {"loss": float(value)}

    return gradients


@pytest.mark.parametrize("norm", ["global", "layer"])
def test_a_sharpness_step_takes_the_gradient_where_the_loss_is_worst(norm):
    model, loss = model_and_loss()
    method = SQuAT(rho=RHO, norm=norm)
    method.attach(model, dict)
    method.start(10, 5)
    row = method.wrap(gradients_of(model, loss))()
    at = quantized(model)
    before, gradient = oracle(model, at)
    worst, there = oracle(model, at + RHO * gradient / np.linalg.norm(gradient))
    np.testing.assert_allclose(row["loss"], before, rtol=1e-5)
    np.testing.assert_allclose(row["sharpness"], worst - before, rtol=1e-3)
    assert worst > before
    inside = (
        np.abs(WEIGHT / model.linear._fake_quant_weight.step().numpy()) <= 1
    )  # straight through, but for what is clipped
    assert 0 < inside.mean() < 1
    np.testing.assert_allclose(model.linear.weight.grad.numpy(), there * inside, rtol=1e-3, atol=1e-6)
    assert model.linear._fake_quant_weight.lsq_step.grad is None  # frozen


def test_a_step_size_step_moves_the_steps_only():
    model, loss = model_and_loss()
    method = SQuAT()
    method.attach(model, dict)
    method.start(10, 5)
    gradients = gradients_of(model, loss)
    step = method.wrap(gradients)
    step()
    method.after_step()
    row = step()
    assert set(row) == {"loss"}
    assert model.linear.weight.grad is None
    got = model.linear._fake_quant_weight.lsq_step.grad.numpy()
    gradients()
    np.testing.assert_array_equal(got, model.linear._fake_quant_weight.lsq_step.grad.numpy())


@pytest.mark.parametrize(("alternate", "expected"), [("step", "wswsws"), ("epoch", "wwwsss"), ("off", "bbbbbb")])
def test_turns(alternate, expected):
    model, loss = model_and_loss()
    method = SQuAT(alternate=alternate)
    method.attach(model, dict)
    method.start(6, 3)
    step = method.wrap(gradients_of(model, loss))
    found = ""
    for _ in expected:
        step()
        moved = model.linear.weight.grad is not None, model.linear._fake_quant_weight.lsq_step.grad is not None
        found += {(True, False): "w", (False, True): "s", (True, True): "b"}[moved]
        method.after_step()
        resumed = SQuAT(alternate=alternate)
        resumed.load_state(json.loads(json.dumps(method.state())))
        assert resumed.done == method.done
    assert found == expected


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("raises", [False, True])
def test_weights_are_bit_for_bit_what_they_were(latent, raises):
    model, loss = model_and_loss()
    perturbation = Perturbation(model, latent)
    with perturbation.recorded() as found:
        loss().backward()
    far = 10 * RHO  # so that latent weights are rounded to others
    before, simulated = model.linear.weight.numpy(), model(paddle.to_tensor(X)).numpy()
    try:
        with perturbation.applied(found, far, by_layer=False):
            assert np.abs(model(paddle.to_tensor(X)).numpy() - simulated).max() > 0
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    np.testing.assert_array_equal(model.linear.weight.numpy(), before)
    np.testing.assert_array_equal(model(paddle.to_tensor(X)).numpy(), simulated)


def test_latent_weights_are_moved_before_they_are_rounded():
    model, loss = model_and_loss()
    perturbation = Perturbation(model, latent=True)
    model.clear_gradients()
    with perturbation.recorded() as found:
        loss().backward()
    gradient = model.linear.weight.grad.numpy().astype(np.float64)
    with perturbation.applied(found, RHO, by_layer=False):
        moved = model.linear.weight.numpy()
    np.testing.assert_allclose(moved, WEIGHT + RHO * gradient / np.linalg.norm(gradient), rtol=1e-5)


def test_the_length_is_that_of_all_layers_together_or_of_each():
    gradients = {"a": paddle.to_tensor([3.0, 0.0]), "b": paddle.to_tensor([0.0, 4.0]), "c": paddle.zeros([2])}
    together = {name: tensor.numpy().tolist() for name, tensor in scaled(gradients, 0.5, False).items()}
    each = {name: tensor.numpy().tolist() for name, tensor in scaled(gradients, 0.5, True).items()}
    assert together == {"a": pytest.approx([0.3, 0]), "b": pytest.approx([0, 0.4]), "c": [0, 0]}
    assert each == {"a": pytest.approx([0.5, 0]), "b": pytest.approx([0, 0.5]), "c": [0, 0]}


@pytest.mark.parametrize("weight", [W2.weight, WeightQuant(bits=3)], ids=["lsq", "minmax"])
def test_sharpness_is_what_the_loss_rises_by(weight):
    model, loss = model_and_loss(Quant(weight, W2.activation))
    at = quantized(model)
    before, gradient = oracle(model, at)
    worst, _ = oracle(model, at + RHO * gradient / np.linalg.norm(gradient))
    np.testing.assert_allclose(sharpness(model, [loss, loss], RHO), worst - before, rtol=1e-3)
    assert model.linear.weight.grad is None
    assert not model.training
    with pytest.raises(UserError, match="no quantized weights"):
        sharpness(OneLinear(WEIGHT, None), [loss])


def test_sharpness_leaves_no_hook_behind():
    model, loss = model_and_loss()
    hooks = model.linear._fake_quant_weight._forward_post_hooks
    sharpness(model, [loss], RHO)
    assert not hooks

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sharpness(model, [broken], RHO)
    assert not hooks


def test_without_perturbation_and_turns_it_is_plain_lsq(tmp_path, tiny_ernie, tiny_task):
    brief = {"max_steps": 4}
    off = {"rho": 0.0, "alternate": "off"}
    train(settings(tmp_path, tiny_ernie, tiny_task, "absent", Slim=LSQ, Train=brief))
    train(settings(tmp_path, tiny_ernie, tiny_task, "off", Slim={**LSQ, "squat": off}, Train=brief))
    same(weights_of(tmp_path / "absent"), weights_of(tmp_path / "off"))


def test_each_turn_moves_its_own_parameters(tmp_path, tiny_ernie, tiny_task):
    run = {"Slim": {**LSQ, "squat": {}}, "Train": {"max_steps": 4, "save_steps": 1, "learning_rate": 1e-3}}
    found, save = [], Trainer._save

    def keep(trainer):
        found.append({name: tensor.numpy().copy() for name, tensor in trainer.model.named_parameters()})
        save(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save", keep)
        train(settings(tmp_path, tiny_ernie, tiny_task, **run))
    for turn, (before, after) in enumerate(zip(found, found[1:]), start=1):  # step 0 was a sharp one
        moved = {name for name in before if not np.array_equal(before[name], after[name])}
        assert moved
        assert {"_fake_quant_" in name for name in moved} == {bool(turn % 2)}, (turn, moved)


@pytest.mark.parametrize(
    ("slim", "message"),
    [
        ({"squat": {}}, "Slim.squat: needs quantized weights"),
        ({**QAT, "squat": {}}, "Slim.squat.alternate: step needs trained steps; say quantizer: lsq or range: learned"),
        ({**LSQ, "squat": {"rho": -1}}, "Slim.squat.rho: -1"),
    ],
)
def test_mistakes_are_named(tmp_path, tiny_ernie, tiny_task, slim, message):
    with pytest.raises(UserError, match=message):
        train(settings(tmp_path, tiny_ernie, tiny_task, Slim=slim))
