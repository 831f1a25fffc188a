"""Kurtosis against a NumPy float64 oracle; targets; both ways to apply it."""

import numpy as np
import paddle
import pytest

from ernie_kqat import UserError
from ernie_kqat.methods import kurtosis as K
from ernie_kqat.methods.kurtosis import Kurtosis


def oracle(weight: np.ndarray) -> tuple[float, np.ndarray]:
    """K and dK/dW from the paper's definition, in float64."""
    w = weight.astype(np.float64)
    z = (w - w.mean()) / w.std()
    k = (z**4).mean()
    return k, 4 / (w.size * w.std()) * (z**3 - (z**3).mean() - k * z)


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


@pytest.mark.parametrize("name", list(matrices()))
def test_moments_and_gradient_equal_the_oracle(name):
    weight = matrices()[name]
    expected, gradient = oracle(weight)
    found = K.moments(paddle.to_tensor(weight))
    assert found.kurtosis == pytest.approx(expected, rel=1e-5)
    assert K.kurtosis(weight) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(K.kurtosis_gradient(found).numpy(), gradient, atol=1e-5 * np.abs(gradient).max())


def test_oracle_gradient_is_the_derivative():
    weight = matrices()["encoder.layers.1.linear1"].astype(np.float64)
    _, gradient = oracle(weight)
    bumped = weight.copy()
    bumped[4, 7] += 1e-5
    assert (oracle(bumped)[0] - oracle(weight)[0]) / 1e-5 == pytest.approx(gradient[4, 7], rel=1e-3)


def test_known_distributions():
    rng = np.random.default_rng(5)
    assert K.kurtosis(rng.uniform(size=(1000, 400))) == pytest.approx(1.8, rel=0.01)
    assert K.kurtosis(rng.standard_normal((1000, 400))) == pytest.approx(3.0, rel=0.01)
    assert K.kurtosis(rng.laplace(size=(1000, 400))) == pytest.approx(6.0, rel=0.05)


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
    assert method.target["encoder.layers.0.linear2"] == 3.0
    assert method.target["encoder.layers.0.linear1"] == pytest.approx((original["encoder.layers.0.linear1"] + 1.8) / 2)
    assert method.target["encoder.layers.1.linear1"] == pytest.approx(original["encoder.layers.1.linear1"])


def test_targets_come_from_the_original_weights_not_the_present_ones():
    method = attached(weights=matrices(1), original=matrices(0))
    assert method.target["encoder.layers.1.linear1"] == pytest.approx(
        oracle(matrices(0)["encoder.layers.1.linear1"])[0]
    )


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
    assert attached(lambda_=0.0).loss_terms(None, None) == {}


def test_warmup_raises_lambda():
    method = attached(targets={"fixed": 1.8}, warmup_steps=4)
    values = []
    for _ in range(6):
        values.append(float(method.regularization()))
        method.after_step()
    np.testing.assert_allclose(np.array(values) / values[-1], [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-5)


def test_state_comes_back():
    method = attached(targets={"fixed": 1.8}, warmup_steps=4)
    method.after_step()
    other = attached(targets={"fixed": 1.8}, warmup_steps=4)
    other.load_state(method.state())
    assert (other.steps, other.target) == (1, method.target)


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
