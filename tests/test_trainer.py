"""The training loop: it learns, it is deterministic, it resumes exactly, and a method switched off is absent."""

import json
import os
import signal

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import ErnieForSequenceClassification, ErnieTokenizer

from ernie_kqat import UserError, checkpoint, config, run_folder, strict, trainer
from ernie_kqat.interrupt import Interrupted
from ernie_kqat.restore import restore_run
from ernie_kqat.strides import FLAG
from ernie_kqat.trainer import train


def settings(tmp_path, tiny_ernie, tiny_task, name="run", **sections):
    tree = {
        "Global": {"output_dir": str(tmp_path / name), "seed": 3, "log_every": 4},
        "Model": {"name_or_path": str(tiny_ernie)},
        "Data": {"path": str(tiny_task), "max_length": 32, **sections.get("Data", {})},
        "Slim": sections.get("Slim"),
        "Train": {"epochs": 2, "batch_size": 32, "learning_rate": 3e-3, **sections.get("Train", {})},
    }
    return config.from_tree(tree, "test")


QAT = {"quant": {"weight": {"bits": 8}}}
KURTOSIS = {
    "quant": {"weight": {"bits": 4, "range": "mse"}},
    "kurtosis": {"targets": {"cap": 2.5}, "apply": "decoupled"},
}
LEARNED = {
    "quant": {
        "weight": {"bits": 4, "range": "learned", "range_lr": 1},
        "activation": {"range": "learned", "range_lr": 1},
    },
    "kurtosis": {"targets": {"anneal": 2.0}, "granularity": "channel", "balance": 0.2, "every": 2},
}
LSQ = {
    "quant": {
        # step_lr: these runs' learning rate is a hundred times a real one
        "weight": {"quantizer": "lsq", "bits": 4, "step_lr": 0.01},
        "activation": {"quantizer": "lsq", "offset": True, "step_lr": 0.01},
    },
}
SMOOTHED = {
    "quant": {"weight": {"bits": 4, "range": "mse"}, "activation": {"range": "learned", "range_lr": 1}},
    "smoothquant": {},
    "brecq": {"iterations": 3, "step_iterations": 3},
    "bias_correction": {},
}
EMBEDDING = {
    "quant": {
        "embedding": {
            "bits": 4,
            "range": "mse",
            "tables": [["position", {"quantizer": "lsq", "step_lr": 0.01}], ["token_type", {"granularity": "tensor"}]],
        },
    },
}
ATTENTION = {"quant": {"attention": {"range": "learned", "range_lr": 1}}}


def newest(run):
    return checkpoint.checkpoints(run / "checkpoints")[0]


def weights_of(run):
    return dict(np.load(newest(run) / "arrays.npz"))


def same(first, second):
    assert set(first) == set(second)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize("slim", [None, QAT, KURTOSIS, LEARNED, LSQ], ids=["fp32", "qat", "kurtosis", "learned", "lsq"])
def test_it_learns_and_leaves_a_whole_run_folder(tmp_path, tiny_ernie, tiny_task, slim):
    # Twice as long as it takes: how fast so few steps learn depends on the last bits, and so on the CPU.
    summary = train(settings(tmp_path, tiny_ernie, tiny_task, Slim=slim, Train={"epochs": 4}))
    run = tmp_path / "run"
    assert summary["best_accuracy"] > summary["fp32_start_accuracy"] + 0.2
    assert summary["steps"] == 32
    expected = {"resolved.yaml", "plan.txt", "train.log", "metrics.jsonl", "summary.json", "best_model", "checkpoints"}
    assert expected <= {path.name for path in run.iterdir()}
    assert (run / "kurtosis.json").exists() == ("kurtosis" in (slim or {}))
    model = ErnieForSequenceClassification.from_pretrained(str(run / "best_model"))
    assert ErnieTokenizer.from_pretrained(str(run / "best_model")).vocab_size == model.config.vocab_size
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] == {"step": 32, **{f"eval_{name}": value for name, value in summary["scores"].items()}}
    assert "epoch: [4/4], iter: 8/8, lr:" in (run / "train.log").read_text()


def test_the_restored_best_model_gives_the_accuracy_that_was_logged(tmp_path, tiny_ernie, tiny_task):
    from ernie_kqat.measure import evaluate_any

    summary = train(settings(tmp_path, tiny_ernie, tiny_task, Slim=KURTOSIS))
    assert restore_run(tmp_path / "run").quant.weight.bits == 4
    found = evaluate_any(tmp_path / "run", tiny_task, config.Data())
    assert (found["kind"], found["accuracy"]) == ("run", summary["best_accuracy"])


def test_a_run_computes_without_views(tmp_path, tiny_ernie, tiny_task, monkeypatch):
    seen, batch = set(), trainer.Trainer._batch

    def looking(self, rows):
        seen.add(paddle.get_flags(FLAG)[FLAG])
        return batch(self, rows)

    monkeypatch.setattr(trainer.Trainer, "_batch", looking)
    train(settings(tmp_path, tiny_ernie, tiny_task, Slim=QAT, Train={"max_steps": 1}))
    assert seen == {False}


def test_select_last_keeps_the_last_model_and_not_the_best(tmp_path, tiny_ernie, tiny_task):
    """A learning rate that destroys the model after a good start."""
    for select in ("best", "last"):
        destroys = {"epochs": 1, "learning_rate": 1.0, "max_grad_norm": 0, "select": select}
        made = settings(tmp_path, tiny_ernie, tiny_task, select, Train=destroys)
        train(made)
    stored = {select: restore_run(tmp_path / select).model.classifier.weight.numpy() for select in ("best", "last")}
    last = weights_of(tmp_path / "last")["model/classifier.weight"]
    np.testing.assert_array_equal(stored["last"], last)
    assert (stored["best"] != last).any()


@pytest.mark.parametrize("slim", [KURTOSIS, LEARNED, SMOOTHED], ids=["kurtosis", "learned", "smoothed"])
def test_what_was_trained_is_what_is_exported(tmp_path, tiny_ernie, tiny_task, slim):
    from ernie_kqat.export.exporter import export_run

    train(settings(tmp_path, tiny_ernie, tiny_task, Slim=slim))
    found = export_run(str(tmp_path / "run"), str(tmp_path / "out"), config.Export())["verification"]
    assert found["passed"]
    assert found["agreement"] >= 0.98


def test_ptq_is_zero_epochs(tmp_path, tiny_ernie, tiny_task):
    summary = train(settings(tmp_path, tiny_ernie, tiny_task, Slim=QAT, Train={"epochs": 0}))
    assert summary["steps"] == 0
    assert restore_run(tmp_path / "run").model.ernie.pooler.dense._fake_quant_input.calibrated()


def test_same_seed_same_run_and_another_seed_another(tmp_path, tiny_ernie, tiny_task):
    for name in "ab":
        train(settings(tmp_path, tiny_ernie, tiny_task, name, Slim=QAT, Train={"epochs": 1}))
    same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    other = settings(tmp_path, tiny_ernie, tiny_task, "c", Slim=QAT, Train={"epochs": 1})
    train(config.from_tree({**strict.to_tree(other), "Global": {"output_dir": str(tmp_path / "c"), "seed": 4}}, "test"))
    first, third = weights_of(tmp_path / "a"), weights_of(tmp_path / "c")
    assert any((first[name] != third[name]).any() for name in first)


@pytest.mark.parametrize(
    "slim",
    [None, QAT, KURTOSIS, LEARNED, LSQ, SMOOTHED, EMBEDDING, ATTENTION],
    ids=["fp32", "qat", "kurtosis", "learned", "lsq", "smoothed", "embedding", "attention"],
)
def test_an_interrupted_run_resumes_exactly(tmp_path, tiny_ernie, tiny_task, slim, monkeypatch):
    accumulate = {"accumulate": 2, "epochs": 3}
    train(settings(tmp_path, tiny_ernie, tiny_task, "whole", Slim=slim, Train=accumulate))
    step = trainer.Trainer._step

    def interrupted_step(self, batches, stop):
        if self.progress.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batches, stop)

    monkeypatch.setattr(trainer.Trainer, "_step", interrupted_step)
    cut = settings(tmp_path, tiny_ernie, tiny_task, "cut", Slim=slim, Train=accumulate)
    with pytest.raises(Interrupted):
        train(cut)
    assert json.loads((newest(tmp_path / "cut") / "state.json").read_text())["progress"]["step"] == 7
    monkeypatch.undo()
    train(cut, resume=True)
    same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))
    first, second = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut"))
    assert first == second


@pytest.mark.parametrize(
    "off", [{"targets": {"fixed": 1.8}, "lambda": 0.0}, {"targets": {"fixed": 1.8}, "apply": "decoupled", "rate": 0.0}]
)
def test_a_method_switched_off_is_bit_identical_to_its_absence(tmp_path, tiny_ernie, tiny_task, off):
    train(settings(tmp_path, tiny_ernie, tiny_task, "without", Slim=QAT, Train={"epochs": 1}))
    train(settings(tmp_path, tiny_ernie, tiny_task, "off", Slim={**QAT, "kurtosis": off}, Train={"epochs": 1}))
    same(weights_of(tmp_path / "without"), weights_of(tmp_path / "off"))


def test_accumulated_batches_give_the_gradient_of_the_whole(tmp_path, tiny_ernie, tiny_task):
    """Without dropout, 4 batches of 8 and 1 of 32 take the same step, kurtosis counted once."""
    slim = {"kurtosis": {"targets": {"fixed": 1.8}, "lambda": 0.1}}
    grads = []
    for size in (32, 8):
        made = settings(tmp_path, tiny_ernie, tiny_task, f"n{size}", Slim=slim, Train={"max_grad_norm": 0})
        tree = strict.to_tree(made)
        tree["Model"]["dropout"] = 0.0
        folder = run_folder.RunFolder(tmp_path / "unused", made)
        one = trainer.Trainer(config.from_tree(tree, "test"), folder)
        one.model.train()
        rows = np.arange(32)
        one._step([rows[start : start + size] for start in range(0, 32, size)])
        grads.append({name: p.grad.numpy() for name, p in one.model.named_parameters()})
    for name, value in grads[0].items():
        np.testing.assert_allclose(value, grads[1][name], atol=2e-6 + 1e-5 * np.abs(value).max(), err_msg=name)


def test_max_steps_and_schedule(tmp_path, tiny_ernie, tiny_task):
    train(settings(tmp_path, tiny_ernie, tiny_task, Train={"max_steps": 4, "eval_steps": 2}))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [0, 2, 4]


def test_visualdl_scalars(tmp_path, tiny_ernie, tiny_task):
    made = settings(tmp_path, tiny_ernie, tiny_task, Train={"max_steps": 4})
    train(
        config.from_tree({**strict.to_tree(made), "Global": {**strict.to_tree(made.Global), "visualdl": True}}, "test")
    )
    assert list((tmp_path / "run/vdl").iterdir())


def test_a_run_is_not_overwritten_unasked(tmp_path, tiny_ernie, tiny_task):
    made = settings(tmp_path, tiny_ernie, tiny_task, Train={"max_steps": 2})
    train(made)
    before = (tmp_path / "run/summary.json").read_text()
    with pytest.raises(UserError, match="already holds a run"):
        train(made)
    assert (tmp_path / "run/summary.json").read_text() == before
    train(made, overwrite=True)


def test_resuming_with_another_config_names_what_changed(tmp_path, tiny_ernie, tiny_task):
    train(settings(tmp_path, tiny_ernie, tiny_task, Train={"max_steps": 2}))
    with pytest.raises(UserError, match=r"Train.batch_size was 32, is 8"):
        train(settings(tmp_path, tiny_ernie, tiny_task, Train={"max_steps": 2, "batch_size": 8}), resume=True)
    with pytest.raises(UserError, match="no run to resume"):
        train(settings(tmp_path, tiny_ernie, tiny_task, "other"), resume=True)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "state"])
def test_a_damaged_checkpoint_is_refused(tmp_path, tiny_ernie, tiny_task, damage):
    made = settings(tmp_path, tiny_ernie, tiny_task, Train={"max_steps": 2})
    train(made)
    arrays, state = newest(tmp_path / "run") / "arrays.npz", newest(tmp_path / "run") / "state.json"
    content = arrays.read_bytes()
    if damage == "cut":
        arrays.write_bytes(content[:1000])
    elif damage == "flip":
        arrays.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif damage == "gone":
        arrays.unlink()
    else:
        state.write_text("{")
    with pytest.raises(UserError, match="no checkpoint is whole: .*step_00000002.*damaged"):
        train(made, resume=True)


def test_the_newest_whole_checkpoint_is_taken_and_old_ones_go(tmp_path, tiny_ernie, tiny_task):
    often = {"epochs": 1, "save_steps": 2}
    train(settings(tmp_path, tiny_ernie, tiny_task, "whole", Slim=QAT, Train=often))
    made = settings(tmp_path, tiny_ernie, tiny_task, "cut", Slim=QAT, Train={**often, "keep": 3})
    train(made)
    found = checkpoint.checkpoints(tmp_path / "cut/checkpoints")
    assert [path.name for path in found] == ["step_00000008", "step_00000006", "step_00000004"]
    assert len(checkpoint.checkpoints(tmp_path / "whole/checkpoints")) == 2
    (found[0] / "arrays.npz").write_bytes(b"cut")
    (found[1] / "state.json").unlink()
    left = [
        found[0].parent / ".step_00000002.gone",
        found[0].parent / ".step_00000008.new.x",
        tmp_path / "cut/.best_model.new.y",
    ]
    for path in left:
        path.mkdir()
    train(made, resume=True)
    log = (tmp_path / "cut/train.log").read_text()
    assert "step_00000008/arrays.npz: damaged" in log
    assert "resumed at step 4/8" in log
    same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))
    assert not [path for path in left if path.exists()]


def test_a_loss_that_is_not_finite_is_named(tmp_path, tiny_ernie, tiny_task):
    made = settings(tmp_path, tiny_ernie, tiny_task)
    one = trainer.Trainer(made, run_folder.RunFolder(tmp_path / "unused", made))
    one.model.classifier.weight.set_value(one.model.classifier.weight * float("inf"))
    with pytest.raises(UserError, match=r"not finite at step 1.*lower Train.learning_rate"):
        one._step([np.arange(8)])


def test_checkpoint_of_another_model_is_refused(tmp_path, tiny_ernie, tiny_task):
    linear, other = paddle.nn.Linear(2, 3), paddle.nn.Linear(3, 3)
    optimizer = paddle.optimizer.AdamW(parameters=linear.parameters())
    checkpoint.save(tmp_path / "c", 1, linear, optimizer, {"step": 1})
    with pytest.raises(UserError, match="another model: weight"):
        checkpoint.load(tmp_path / "c", other, paddle.optimizer.AdamW(parameters=other.parameters()))
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path / "none", linear, optimizer)
