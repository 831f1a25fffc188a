"""Kurtosis against a NumPy float64 oracle; targets; both ways to apply it."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_kqat import UserError
from ernie_kqat.methods.kurtosis import Kurtosis, moments


def oracle(weight: np.ndarray, axis: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """K and dK/dW from the paper's definition, in float64; axis 0: of each output channel."""
    w = weight.astype(np.float64)
    z = (w - w.mean(axis=axis)) / w.std(axis=axis)
    k = (z**4).mean(axis=axis)
    return k, 4 / (w.size / np.size(k) * w.std(axis=axis)) * (z**3 - (z**3).mean(axis=axis) - k * z)


def matrices(seed=0):
    rng = np.random.default_rng(seed)
    heavy = rng.standard_normal((30, 50)) * 0.05
    heavy[2, 3] = 2.0
    return {
        "encoder.layers.0.linear1": rng.uniform(-1, 1, (20, 30)).astype(np.float32),
        "encoder.layers.0.linear2": heavy.astype(np.float32),
        "encoder.layers.1.linear1": rng.laplace(size=(30, 20)).astype(np.float32),
    }


class Holder(paddle.nn.Layer):
    """A model of named Linears."""

    def __init__(self, weights):
        super().__init__()
        self.encoder = paddle.nn.Layer()
        self.encoder.layers = paddle.nn.LayerList([paddle.nn.Layer(), paddle.nn.Layer()])
        for name, value in weights.items():
            _, _, index, leaf = name.split(".")
            linear = paddle.nn.Linear(*value.shape)
            linear.weight.set_value(value)
            setattr(self.encoder.layers[int(index)], leaf, linear)


def attached(weights=None, original=None, **options):
    weights = weights or matrices()
    method = Kurtosis(**options)
    named = {f"{name}.weight": value for name, value in (original or weights).items()}
    method.attach(Holder(weights), lambda: named)
    return method


@pytest.mark.parametrize("axis", [None, 0], ids=["tensor", "channel"])
@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("name", list(matrices()))
def test_moments_and_gradient_equal_the_oracle(name, shift, axis):
    weight = matrices()[name] + np.float32(shift)
    expected, gradient = oracle(weight, axis)
    found = moments.moments_of(paddle.to_tensor(weight), axis == 0)
    np.testing.assert_allclose(found.kurtosis, np.atleast_1d(expected), rtol=1e-5)
    np.testing.assert_allclose(moments.group_kurtosis(weight, axis == 0), np.atleast_1d(expected), rtol=1e-12)
    np.testing.assert_allclose(moments.gradient(found).numpy(), gradient, atol=1e-5 * np.abs(gradient).max())


def test_oracle_gradient_is_the_derivative():
    weight = matrices()["encoder.layers.1.linear1"].astype(np.float64)
    _, gradient = oracle(weight)
    bumped = weight.copy()
    bumped[4, 7] += 1e-5
    assert (oracle(bumped)[0] - oracle(weight)[0]) / 1e-5 == pytest.approx(gradient[4, 7], rel=1e-3)


def test_known_distributions():
    rng = np.random.default_rng(5)
    assert moments.kurtosis(rng.uniform(size=(1000, 400))) == pytest.approx(1.8, rel=0.01)
    assert moments.kurtosis(rng.standard_normal((1000, 400))) == pytest.approx(3.0, rel=0.01)
    assert moments.kurtosis(rng.laplace(size=(1000, 400))) == pytest.approx(6.0, rel=0.05)


@pytest.mark.parametrize("loss", ["squared", "relative", "log"])
@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_loss_and_its_gradients_equal_the_oracle(loss, reduce):
    method = attached(targets={"fixed": 1.8}, loss=loss, reduce=reduce, lambda_=0.7)
    value = method.regularization()
    (value * 2.0).backward()
    rho, derivative = {}, {}
    for name, weight in matrices().items():
        k, gradient = oracle(weight)
        rho[name] = {"squared": (k - 1.8) ** 2, "relative": (k / 1.8 - 1) ** 2, "log": np.log(k / 1.8) ** 2}[loss]
        slope = {"squared": 2 * (k - 1.8), "relative": 2 * (k / 1.8 - 1) / 1.8, "log": 2 * np.log(k / 1.8) / k}[loss]
        derivative[name] = slope * gradient
    largest = max(rho, key=rho.get)
    share = {name: {"mean": 1 / 3, "sum": 1.0, "max": float(name == largest)}[reduce] for name in rho}
    assert float(value) == pytest.approx(0.7 * sum(share[name] * rho[name] for name in rho), rel=1e-4)
    for name, weight in method.weights.items():
        expected = 2 * 0.7 * share[name] * derivative[name]
        np.testing.assert_allclose(weight.grad.numpy(), expected, atol=2e-5 * np.abs(expected).max() + 1e-12)


def test_target_policies():
    rules = [
        [r"linear2$", {"cap": 3.0}],
        [r"layers\.0", {"shrink": 0.5}],
        [r"layers\.1", "pretrained"],
    ]
    method = attached(targets=rules)
    original = {name: oracle(weight)[0] for name, weight in matrices().items()}
    target = {name: row["target"] for name, row in method.report().items()}
    assert target["encoder.layers.0.linear2"] == 3.0
    assert target["encoder.layers.0.linear1"] == pytest.approx((original["encoder.layers.0.linear1"] + 1.8) / 2)
    assert target["encoder.layers.1.linear1"] == pytest.approx(original["encoder.layers.1.linear1"])


def test_targets_from_a_file(tmp_path):
    path = tmp_path / "targets.yaml"
    names = list(matrices())
    path.write_text(f"{names[0]}: 2.5\n{names[1]}: 4\n{names[2]}: 3.0\n")
    method = attached(targets={"file": str(path)})
    assert [row["target"] for row in method.report().values()] == [2.5, 4.0, 3.0]
    per_channel = [2.0 + 0.1 * channel for channel in range(30)]
    path.write_text(f"{names[0]}: {per_channel}\n")
    method = attached(targets=[["layers.0.linear1", {"file": str(path)}]], granularity="channel")
    np.testing.assert_allclose(method.target[names[0]].end, per_channel)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read as YAML: .*No such file"),
        ("a: [", "cannot be read as YAML"),
        ("encoder.layers.0.linear1: 2\n", "no target for encoder.layers.0.linear2; it needs a line"),
        ("encoder.layers.0.linear1: 0.5\n", "encoder.layers.0.linear1: '0.5' is not a kurtosis of 1 or more"),
        ("encoder.layers.0.linear1: [2, 3]\n", "is not a kurtosis of 1 or more"),
        ("encoder.layers.0.linear1: small\n", "'small' is not a kurtosis"),
    ],
)
def test_a_wrong_target_file_is_named(tmp_path, text, message):
    path = tmp_path / "targets.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        attached(targets={"file": str(path)})
    assert str(path) in str(error.value)


def test_annealing_moves_evenly_in_log_kurtosis():
    name = "encoder.layers.0.linear2"
    method = attached(targets=[[name, {"anneal": 2.0}]])
    method.start(11, 11)
    k0 = oracle(matrices()[name])[0]
    found = []
    for _ in range(13):
        found.append(method.report()[name]["target"])
        method.after_step()
    expected = [k0 * (2.0 / k0) ** min(1.0, step / 10) for step in range(13)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_annealing_needs_a_length():
    method = attached(targets={"anneal": 2.0})
    with pytest.raises(UserError, match="anneal_steps"):
        method.regularization()
    assert attached(targets={"anneal": 2.0}, anneal_steps=5).report()


def test_per_channel_loss_and_gradient_equal_the_oracle():
    method = attached(targets={"fixed": 3.0}, loss="log", granularity="channel")
    value = method.regularization()
    value.backward()
    total = 0.0
    for name, weight in method.weights.items():
        k, gradient = oracle(matrices()[name], 0)
        total += np.mean(np.log(k / 3.0) ** 2) / 3
        expected = 2 * np.log(k / 3.0) / k / len(k) * gradient / 3
        np.testing.assert_allclose(weight.grad.numpy(), expected, atol=2e-5 * np.abs(expected).max())
    assert float(value) == pytest.approx(total, rel=1e-5)


def test_per_channel_decoupled_steps_reach_the_cap_in_every_channel():
    method = attached(targets={"cap": 2.6}, granularity="channel", apply="decoupled", rate=0.1)
    for _ in range(300):
        method.after_step()
    for name, weight in method.weights.items():
        k0, k = oracle(matrices()[name], 0)[0], oracle(weight.numpy(), 0)[0]
        assert (k[k0 > 2.6] <= 2.6 * 1.002).all(), name
        np.testing.assert_array_equal(weight.numpy()[:, k0 <= 2.6], matrices()[name][:, k0 <= 2.6])


def gradients_of(method, task, times=1):
    """The method's weights' gradients after `times` steps whose task gradient is `task` everywhere."""

    def gradients():
        for weight in method.weights.values():
            weight.clear_grad()
            (weight * task).sum().backward()
        return {"loss": 1.0}

    for _ in range(times):
        losses = method.wrap(gradients)()
        found = {name: weight.grad.numpy() for name, weight in method.weights.items()}
        method.after_step()
    return losses, found


def test_in_training_the_term_is_added_to_the_task_gradient():
    method = attached(targets={"fixed": 1.8}, lambda_=0.5)
    losses, found = gradients_of(method, 0.25)
    value, expected = method.value_and_gradients()
    assert losses == {"loss": 1.0, "kurtosis": pytest.approx(value)}
    for gradient, name in zip(expected, found):
        np.testing.assert_allclose(found[name], 0.25 + gradient.numpy(), rtol=1e-6)
    figures = method.figures()
    assert figures["kurtosis_grad_norm"] == pytest.approx(moments.norm(expected), rel=1e-6)
    assert figures["task_grad_norm"] == pytest.approx(
        0.25 * np.sqrt(sum(w.size for w in matrices().values())), rel=1e-6
    )


def test_balance_sets_the_ratio_of_the_gradients_and_lambda_bounds_it():
    method = attached(targets={"fixed": 1.8}, balance=0.3, lambda_=1e6)
    gradients_of(method, 0.25)
    figures = method.figures()
    assert figures["kurtosis_grad_norm"] / figures["task_grad_norm"] == pytest.approx(0.3, rel=1e-5)
    bounded = attached(targets={"fixed": 1.8}, balance=0.3, lambda_=1e-6)
    plain = attached(targets={"fixed": 1.8}, lambda_=1e-6)
    np.testing.assert_array_equal(
        *(gradients_of(m, 0.25)[1]["encoder.layers.0.linear2"] for m in (bounded, plain)),
    )


def test_every_kth_step_is_k_times_as_strong():
    method = attached(targets={"fixed": 1.8}, every=3)
    for _ in range(2):
        losses, found = gradients_of(method, 0.25)
        assert losses == {"loss": 1.0}
        assert (found["encoder.layers.0.linear1"] == np.float32(0.25)).all()
    losses, _ = gradients_of(method, 0.25)
    assert losses["kurtosis"] == pytest.approx(3 * attached(targets={"fixed": 1.8}).value_and_gradients()[0])


def test_decoupled_every_kth_step_moves_at_that_step_only():
    method = attached(targets={"cap": 2.5}, apply="decoupled", every=2)
    once = attached(targets={"cap": 2.5}, apply="decoupled", rate=0.06)
    name = "encoder.layers.0.linear2"
    method.after_step()
    np.testing.assert_array_equal(method.weights[name].numpy(), matrices()[name])
    method.after_step()
    once.after_step()
    np.testing.assert_array_equal(method.weights[name].numpy(), once.weights[name].numpy())


def test_targets_come_from_the_original_weights_not_the_present_ones():
    method = attached(weights=matrices(1), original=matrices(0))
    expected = oracle(matrices(0)["encoder.layers.1.linear1"])[0]
    assert method.report()["encoder.layers.1.linear1"]["target"] == pytest.approx(expected)


def test_cap_leaves_layers_under_it_alone():
    method = attached(targets={"cap": 1e6}, apply="loss")
    assert float(method.regularization()) == 0.0
    before = {name: weight.numpy() for name, weight in method.weights.items()}
    Kurtosis.decoupled_step(method)
    for name, weight in method.weights.items():
        np.testing.assert_array_equal(weight.numpy(), before[name])


def test_decoupled_step_is_the_documented_rule():
    method = attached(targets={"cap": 3.0}, apply="decoupled", rate=0.03)
    before = matrices()
    method.after_step()
    for name, weight in method.weights.items():
        k, gradient = oracle(before[name])
        expected = before[name].astype(np.float64)
        if k > 3.0:
            size = min(0.03 * np.abs(before[name]).max() / np.abs(gradient).max(), (k - 3.0) / (gradient**2).sum())
            expected = expected - size * gradient
        np.testing.assert_allclose(weight.numpy(), expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("policy", "goal"), [({"cap": 3.0}, None), ({"fixed": 2.2}, 2.2), ("pretrained", None)])
def test_decoupled_steps_reach_the_targets_and_rest_there(policy, goal):
    method = attached(weights=matrices(7), original=matrices(0), targets=policy, apply="decoupled")
    for _ in range(400):
        method.after_step()
    for name, row in method.report().items():
        if policy == {"cap": 3.0}:
            assert row["kurtosis"] <= 3.0 * 1.001, name
        else:
            assert row["kurtosis"] == pytest.approx(goal or row["target"], rel=1e-3), name


def test_lambda_zero_adds_nothing():
    losses, found = gradients_of(attached(targets={"fixed": 1.8}, lambda_=0.0), 0.25)
    assert losses == {"loss": 1.0}
    assert all((gradient == np.float32(0.25)).all() for gradient in found.values())


def test_warmup_raises_lambda():
    method = attached(targets={"fixed": 1.8}, warmup_steps=4)
    values = []
    for _ in range(6):
        values.append(float(method.regularization()))
        method.after_step()
    np.testing.assert_allclose(np.array(values) / values[-1], [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-5)


def test_state_comes_back():
    options = {"targets": {"anneal": 1.8}, "anneal_steps": 4}
    method = attached(**options)
    method.after_step()
    other = attached(matrices(3), **options)
    other.load_state(method.state())
    assert other.steps == 1
    assert {n: row["target"] for n, row in other.report().items()} == {
        n: r["target"] for n, r in method.report().items()
    }


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([["linear9", "pretrained"]], "'linear9' has no effect: no layer matches"),
        ([[".", "pretrained"], ["linear2", {"cap": 3}]], "earlier rules take all it matches"),
        ([["(", "pretrained"]], "not a regular expression"),
        ({"cap": 0.5}, "not a target policy"),
        ("original", "not a target policy"),
        ([[".", "none"]], "every layer is excluded"),
    ],
)
def test_wrong_targets_are_named(targets, message):
    with pytest.raises(UserError, match="Slim.kurtosis.targets") as error:
        attached(targets=targets)
    assert message in str(error.value)


def test_missing_pretrained_layer_is_named():
    original = matrices()
    del original["encoder.layers.1.linear1"]
    with pytest.raises(UserError, match=r"no encoder.layers.1.linear1.weight"):
        attached(original=original)


def test_a_constant_weight_is_harmless():
    method = attached(weights={"encoder.layers.0.linear1": np.ones((4, 4), np.float32)}, targets={"fixed": 1.8})
    assert float(method.regularization()) == pytest.approx(0.0, abs=1e-12)
    method.decoupled_step()
    assert np.isfinite(next(iter(method.weights.values())).numpy()).all()
