"""Narrower models: importance against finite differences in float64, masking, and the whole way to an INT8 artifact."""

import json
import shutil

import numpy as np
import paddle
import pytest
from test_trainer import QAT, settings
from tiny_ernie import make_tiny_ernie

from ernie_kqat import Predictor, UserError, config
from ernie_kqat.export.exporter import export_run
from ernie_kqat.measure import evaluate_any
from ernie_kqat.models.loading import load_classifier
from ernie_kqat.narrow import importance, measure, most_important, narrow_folder, narrowed
from ernie_kqat.trainer import train

RNG = np.random.default_rng(0)
IDS = RNG.integers(5, 90, (6, 9))
IDS[2:, 6:] = 0  # padding
BATCH = {"input_ids": IDS, "token_type_ids": np.zeros_like(IDS), "labels": RNG.integers(0, 2, 6)}


def logits(model, ids=IDS):
    model.eval()
    return model(paddle.to_tensor(ids), paddle.to_tensor(np.zeros_like(ids))).numpy()


def part(model, layer, name):
    return dict(model.ernie.encoder.layers[layer].named_sublayers())[name]


def test_importance_is_the_sum_over_rows_of_the_size_of_each_rows_sum():
    slopes = RNG.standard_normal((3, 6)).astype(np.float32)
    expected = np.zeros(2)
    for row in range(3):
        for group in range(2):
            expected[group] += abs(sum(float(slopes[row, 3 * group + value]) for value in range(3)))
    np.testing.assert_allclose(importance(slopes, 2), expected)


def test_the_most_important_are_kept_in_their_order():
    assert most_important(np.array([0.1, 3.0, 0.2, 2.0]), 0.5).tolist() == [1, 3]
    assert most_important(np.array([1.0, 1.0, 1.0]), 0.34).tolist() == [0]
    assert most_important(np.array([1.0, 2.0, 3.0]), 0.01).tolist() == [2]
    assert most_important(np.array([1.0, 2.0, 3.0]), 1.0).tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def named(tmp_path_factory, tiny_ernie):
    """The tiny ERNIE with the toy task's label names; read only."""
    folder = shutil.copytree(tiny_ernie, tmp_path_factory.mktemp("named") / "ernie")
    described = json.loads((folder / "config.json").read_text())
    described["id2label"] = {"0": "negative", "1": "positive"}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture
def in_float64(tiny_ernie):
    """The tiny ERNIE, its computations too, in float64."""
    model = load_classifier(str(tiny_ernie), 2).to(dtype="float64")
    paddle.set_default_dtype("float64")
    yield model
    paddle.set_default_dtype("float32")


@pytest.mark.parametrize(("name", "groups", "field"), [("self_attn.out_proj", 4, "heads"), ("linear2", 64, "neurons")])
def test_importance_is_what_a_mask_changes_of_the_loss(in_float64, name, groups, field):
    """Each row's loss, by central differences of a factor on one head or neuron."""
    model = in_float64
    found = measure(model, [BATCH, {key: value[:2] for key, value in BATCH.items()}])
    mask = np.ones(groups)
    width = part(model, 1, name).weight.shape[0]
    part(model, 1, name).register_forward_pre_hook(
        lambda layer, inputs: inputs[0] * paddle.to_tensor(np.repeat(mask, width // groups))
    )

    def losses(group, value):
        mask[group] = value
        out = logits(model)
        mask[group] = 1.0
        log_softmax = out - np.log(np.exp(out).sum(axis=1, keepdims=True))
        return -log_softmax[np.arange(6), BATCH["labels"]]

    for group in range(0, groups, max(1, groups // 8)):
        slopes = np.abs(losses(group, 1 + 1e-4) - losses(group, 1 - 1e-4)) / 2e-4
        got = getattr(found[1], field)[group]
        assert got == pytest.approx(slopes.sum() + slopes[:2].sum(), rel=1e-5, abs=1e-9)


def test_padding_and_batches_change_nothing(tiny_ernie):
    model = load_classifier(str(tiny_ernie), 2)
    whole = measure(model, [BATCH])
    alone = measure(
        model,
        [
            {
                "input_ids": IDS[row : row + 1, : 9 if row < 2 else 6],
                "token_type_ids": IDS[row : row + 1, : 9 if row < 2 else 6] * 0,
            }
            | {"labels": BATCH["labels"][row : row + 1]}
            for row in range(6)
        ],
    )
    for one, other in zip(whole, alone):
        np.testing.assert_allclose(one.heads, other.heads, rtol=1e-3)
        np.testing.assert_allclose(one.neurons, other.neurons, rtol=1e-3, atol=1e-5 * one.neurons.max())
    assert not part(model, 0, "linear2")._forward_pre_hooks


def test_a_narrowed_model_is_the_whole_one_with_the_others_masked(tiny_ernie):
    model = load_classifier(str(tiny_ernie), 2)
    heads = [np.array([0, 2, 3]), np.array([1, 2, 3])]  # 3 heads of 8: 24 of 32, and 32 is no multiple of 3
    neurons = [np.sort(RNG.permutation(64)[:20]) for _ in range(2)]
    new = narrowed(model, heads, neurons)
    assert part(new, 0, "self_attn.q_proj").weight.shape == [32, 24]
    assert part(new, 0, "self_attn.out_proj").weight.shape == [24, 32]
    assert part(new, 0, "linear1").weight.shape == [32, 20]
    for layer in range(2):
        for name, kept, groups in (("self_attn.out_proj", heads[layer], 4), ("linear2", neurons[layer], 64)):
            weight = part(model, layer, name).weight
            mask = np.repeat(np.isin(np.arange(groups), kept), weight.shape[0] // groups)
            weight.set_value(weight.numpy() * mask[:, None])
    np.testing.assert_allclose(logits(new), logits(model), atol=1e-5)


def test_the_whole_width_is_the_very_model(tmp_path, named, tiny_task):
    narrow_folder(str(named), str(tiny_task), 1.0, 1.0, tmp_path / "same", rows=32)
    model, same = (load_classifier(str(folder), 2) for folder in (named, tmp_path / "same"))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(same.state_dict()[name].numpy(), value.numpy(), err_msg=name)
    np.testing.assert_array_equal(logits(same), logits(model))
    assert "head_dim" not in json.loads((tmp_path / "same/config.json").read_text())


@pytest.fixture(scope="module")
def half(tmp_path_factory, named, tiny_task):
    """The tiny ERNIE with half its heads and neurons; read only."""
    folder = tmp_path_factory.mktemp("narrow") / "half"
    narrow_folder(str(named), str(tiny_task), 0.5, 0.5, folder, rows=64)
    return folder


def test_a_narrow_folder_is_loaded_and_narrowed_again(tmp_path, half, named, tiny_task):
    described = json.loads((half / "config.json").read_text())
    assert (described["num_attention_heads"], described["head_dim"], described["intermediate_size"]) == (2, 8, 32)
    whole = load_classifier(str(named), 2)
    rows = narrow_folder(str(half), str(tiny_task), 0.5, 1.0, tmp_path / "quarter", rows=64)
    quarter = load_classifier(str(tmp_path / "quarter"), 2)
    assert part(quarter, 1, "self_attn.k_proj").weight.shape == [32, 8]
    assert rows[-1] == f"parameters: {_size(load_classifier(str(half), 2))} -> {_size(quarter)}"
    assert load_classifier(str(half), 5).new_head  # another head, same encoder
    found = measure(whole, [BATCH])
    assert [len(layer.heads) for layer in found] == [4, 4]


def _size(model):
    return sum(parameter.size for parameter in model.parameters())


def test_a_narrow_model_trains_with_a_wider_teacher_exports_and_predicts(tmp_path, half, named, tiny_task):
    """Hidden states are as wide as the teacher's; the artifact computes what was simulated."""
    slim = {**QAT, "distill": {"teacher": str(named), "hidden": 0.1}}
    train(settings(tmp_path, half, tiny_task, Slim=slim, Train={"max_steps": 4}))
    verification = export_run(str(tmp_path / "run"), str(tmp_path / "int8"), config.Export())["verification"]
    assert verification["passed"]
    assert verification["int8_ops"] == 2 * 6 + 2
    assert verification["fp32_model"] == str(half)
    predictor = Predictor(tmp_path / "int8")
    assert {row.label for row in predictor.predict(["a good film", "a dull story"])} <= {"negative", "positive"}
    found = evaluate_any(tmp_path / "int8", tiny_task, config.Data())
    assert found["accuracy"] == verification["deployed_accuracy"]


def test_a_teacher_of_more_heads_has_no_scores_to_give(tmp_path, half, named, tiny_task):
    slim = {"distill": {"teacher": str(named), "attention": 1.0}}
    with pytest.raises(
        UserError, match="num_attention_heads 4, the student's is 2; say attention: 0, or take an fp32 model"
    ):
        train(settings(tmp_path, half, tiny_task, Slim=slim))
    slim = {"distill": {"teacher": str(half), "attention": 1.0}}
    train(settings(tmp_path, half, tiny_task, Slim=slim, Train={"max_steps": 2}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--heads", 0], "--heads: 0.0 is not a share over 0, up to 1"),
        (["--ffn", 1.5], "--ffn: 1.5 is not a share"),
        (["--rows", 0], "--rows: 0 is under 1"),
        (["--model", "nowhere"], "nowhere"),
        (["--data", "nowhere.tsv"], "nowhere.tsv"),
    ],
)
def test_wrong_input_is_one_line(tool, tmp_path, named, tiny_task, change, words):
    arguments = ["--model", named, "--data", tiny_task, "--output", tmp_path / "o", *change]
    code, _, err = tool("narrow", *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "o").exists()


def test_rows_without_labels_and_encoders_are_refused(tool, tmp_path, named, tiny_task):
    (tmp_path / "s.txt").write_text("a good film\n", encoding="utf-8")
    encoder = make_tiny_ernie(tmp_path / "encoder", head=False)
    for model, data, words in (
        (named, tmp_path / "s.txt", "no labels"),
        (encoder, tiny_task, "without a classifier"),
    ):
        code, _, err = tool("narrow", "--model", model, "--data", data, "--output", tmp_path / "o")
        assert code == 2
        assert words in err


def test_the_tool_writes_a_folder_and_says_what_it_kept(tool, tmp_path, named, tiny_task):
    command = ["narrow", "--model", named, "--data", tiny_task, "--rows", 32, "--output", tmp_path / "o"]
    code, out, err = tool(*command)
    assert code == 0, err
    assert "layer 1: heads " in out
    assert out.splitlines()[-1] == str(tmp_path / "o")
    assert tool(*command)[0] == 2  # not empty
    assert tool("eval", "--model", tmp_path / "o", "--data", tiny_task)[0] == 0
