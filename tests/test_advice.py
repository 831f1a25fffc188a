"""Warnings where a run looks wrong: said once, with advice, and only then."""

import numpy as np
import pytest
from test_trainer import QAT, settings
from tiny_ernie import make_tiny_ernie

from ernie_kqat import KurtosisQAT, advice
from ernie_kqat.calibration import calibrate
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.quantizers import ActivationQuantizer
from ernie_kqat.trainer import train

IDS = np.random.default_rng(0).integers(5, 150, (16, 24))
BATCH = {"input_ids": IDS, "token_type_ids": np.zeros_like(IDS)}


def test_a_label_without_rows_is_named_with_its_dev_rows():
    (line,) = advice.of_labels(np.array([0, 2, 0, 2]), np.array([1, 1, 0]), ["bad", "fair", "good"])
    assert "no train row has the label fair (2 dev rows have)" in line
    assert advice.of_labels(np.array([0, 1, 0, 1]), np.array([1]), ["bad", "good"]) == []


def test_a_train_set_of_nearly_one_label():
    (line,) = advice.of_labels(np.array([0] * 97 + [1] * 3), np.array([1]), ["bad", "good"])
    assert "97.0% of the train rows have the label bad" in line


def test_a_kurtosis_term_above_the_task():
    row = {"loss": 0.5, "kurtosis": 0.6, "kurtosis_grad_norm": 1.0}
    assert "larger than the task's loss" in advice.of_losses(row)[0]
    assert advice.of_losses({**row, "kurtosis": 0.4}) == []
    assert advice.of_losses({"loss": 0.5}) == []


@pytest.mark.parametrize("layer", ["linear1", "linear2"])
def test_clipped_inputs_are_counted_layer_by_layer(tmp_path, layer):
    model = load_classifier(str(make_tiny_ernie(tmp_path / "m")), 2)
    KurtosisQAT({"activation_range": "mse"}).quantize(model)
    calibrate(model, [BATCH])
    shares = advice.clipped(model, BATCH)
    assert len(shares) == 14
    assert max(shares.values()) < advice.MOST_CLIPPED
    assert advice.of_clipping(shares) == []
    (quantizer,) = [
        one
        for name, one in model.named_sublayers()
        if isinstance(one, ActivationQuantizer) and f"layers.1.{layer}." in name
    ]
    seen = []
    hook = quantizer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
    quantizer.set_step(float(quantizer.step()) / 20)
    shares = advice.clipped(model, BATCH)
    hook.remove()
    step = float(quantizer.step())
    outside = (seen[0] / step < quantizer.low - 0.5) | (seen[0] / step > quantizer.high + 0.5)
    name = f"ernie.encoder.layers.1.{layer}"
    assert shares[name] == pytest.approx(outside.mean())
    assert shares[name] > 0.1
    assert f"1 layers clip over 1% of their input ({name} {shares[name]:.1%})" in advice.of_clipping(shares)[0]
    assert not any(one._forward_pre_hooks for one in model.sublayers())


def test_training_says_it_once_in_the_log(tmp_path, tiny_ernie, tiny_task):
    slim = {**QAT, "kurtosis": {"targets": {"fixed": 1.8}, "apply": "loss", "loss": "squared", "lambda": 1e6}}
    task = {"labels": ["negative", "neutral", "positive"]}
    folder = make_tiny_ernie(tmp_path / "three", num_labels=3, head=False)
    train(settings(tmp_path, folder, tiny_task, Slim=slim, Data=task, Train={"epochs": 1}))
    log = (tmp_path / "run/train.log").read_text()
    assert log.count("warning: no train row has the label neutral") == 1
    assert log.count("warning: the kurtosis term") == 1
