"""The tools as a user meets them: help, the main flow, and one clear message for each wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_ernie import make_tiny_ernie
from tiny_tasks import make_entities, make_multilabel, make_questions, make_regression

from ernie_kqat import tasks

ROOT = Path(__file__).parents[1]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "make_venv")


def write_config(path, tiny_ernie, tiny_task, output, **changes):
    tree = {
        "Global": {"output_dir": str(output), "seed": 1, "log_every": 4},
        "Model": {"name_or_path": str(tiny_ernie)},
        "Data": {"path": str(tiny_task), "max_length": 32},
        "Slim": {"quant": {"weight": {"bits": 8}}, "kurtosis": {"targets": "pretrained"}},
        "Train": {"epochs": 2, "batch_size": 32, "learning_rate": 3e-3},
        "Export": {"max_rms_over_std": 0.03},
    }
    for key, value in changes.items():
        tree[key] = {**(tree.get(key) or {}), **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_ernie, tiny_task):
    """A finished run with its artifact; read only."""
    folder = tmp_path_factory.mktemp("done")
    config = write_config(folder / "c.yaml", tiny_ernie, tiny_task, folder / "run")
    for name in ("train", "export"):
        subprocess.run(
            [sys.executable, str(ROOT / f"tools/{name}.py"), "-c", str(config)], check=True, capture_output=True
        )
    return folder


@pytest.mark.parametrize("name", TOOLS)
def test_help_shows_what_to_type(tool, name):
    code, out, _ = tool(name, "--help")
    assert code == 0
    assert "usage:" in out
    assert len(out) > 200


def test_the_main_flow_leaves_numbers_that_agree(done, tool, tiny_task):
    summary = json.loads((done / "run/summary.json").read_text())
    manifest = json.loads((done / "run/inference/manifest.json").read_text())
    found = manifest["verification"]
    assert found["passed"]
    assert found["agreement"] >= 0.995
    assert found["rms_over_std"] <= 0.03
    assert found["int8_ops"] == 2 * 6 + 2
    assert summary["deployed"]["accuracy"] == found["deployed_accuracy"]
    assert set(found["latency_ms"]) >= {"batch_1", "batch_32"}
    for model, kind, accuracy in (
        (done / "run", "run", found["simulated_accuracy"]),
        (done / "run/inference", "artifact", found["deployed_accuracy"]),
        (done / "run/best_model", "fp32 model", None),
    ):
        code, out, _ = tool("eval", "--model", model, "--data", tiny_task)
        row = json.loads(out.splitlines()[-1])
        assert (code, row["kind"], row["rows"]) == (0, kind, 64)
        assert accuracy in (None, row["accuracy"])


def test_serving_conf_describes_the_program(done):
    text = (done / "run/inference/serving_server_conf.prototxt").read_text()
    manifest = json.loads((done / "run/inference/manifest.json").read_text())
    for name in [*manifest["inputs"], manifest["output"]]:
        assert f'name: "{name}"' in text


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_ptq_of_a_plain_folder(done, tool, tmp_path, tiny_task, granularity):
    arguments = ["--model", done / "run/best_model", "--calibration", tiny_task, "--weight-granularity", granularity]
    code, out, _ = tool("export", *arguments, "--output", tmp_path / "a", "--max-length", 32)
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert code == 0, out
    assert manifest["quantization"]["weight"]["granularity"] == granularity
    assert manifest["verification"]["samples"] == 64


def test_ptq_with_methods(done, tool, tmp_path, tiny_task):
    arguments = ["--model", done / "run/best_model", "--calibration", tiny_task, "--output", tmp_path / "a"]
    values = ["Slim.quant.weight.range=mse", "Slim.smoothquant.alpha=0.6", "Slim.bias_correction={}"]
    values.append("Slim.brecq={iterations: 2, step_iterations: 1}")
    code, out, _ = tool("export", *arguments, "--max-length", 32, "-o", *values)
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert code == 0, out
    assert manifest["quantization"]["plan"][-3] == "SmoothQuant: 12 layers, alpha 0.6"
    assert manifest["verification"]["passed"]


def test_a_run_from_an_encoder_is_compared_with_its_own_fp32_weights(tool, tmp_path, tiny_task):
    """Labels 0 and 1 are also what an encoder without a classifier would seem to have."""
    encoder = make_tiny_ernie(tmp_path / "encoder", head=False)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        text = (tiny_task / name).read_text(encoding="utf-8").replace("negative", "0").replace("positive", "1")
        (data / name).write_text(text, encoding="utf-8")
    config = write_config(tmp_path / "c.yaml", encoder, data, tmp_path / "run")
    assert tool("train", "-c", config)[0] == 0
    assert tool("export", "-c", config)[0] == 0
    manifest = json.loads((tmp_path / "run/inference/manifest.json").read_text())
    assert manifest["labels"] == ["0", "1"]
    assert manifest["verification"]["fp32_model"] == str(tmp_path / "run/best_model")


def test_an_export_is_verified_on_plain_sentences_too(tool, tmp_path, done):
    (tmp_path / "s.txt").write_text("a good film\na very dull story\nthe plot was fine\n", encoding="utf-8")
    code, _, _ = tool("export", "--run", done / "run", "--output", tmp_path / "a", "--verify", tmp_path / "s.txt")
    found = json.loads((tmp_path / "a/manifest.json").read_text())["verification"]
    assert (code, found["samples"], found["deployed_accuracy"]) == (0, 3, None)


def test_a_refused_export_is_marked_and_replaces_nothing(done, tool, tmp_path):
    shutil.copytree(done / "run/inference", tmp_path / "a")
    before = (tmp_path / "a/manifest.json").read_text()
    code, out, err = tool(
        "export", "--run", done / "run", "--output", tmp_path / "a", "-o", "Export.max_rms_over_std=0.0"
    )
    assert code == 1
    assert "REFUSED" in err
    assert "worst samples" in out
    assert (tmp_path / "a/manifest.json").read_text() == before
    refused = json.loads((tmp_path / "a.unverified/manifest.json").read_text())
    assert refused["verification"]["passed"] is False
    code, _, err = tool("eval", "--model", tmp_path / "a.unverified", "--data", done)
    assert code == 2
    assert "verif" in err


def test_keys_prints_the_reference(tool):
    code, out, _ = tool("train", "--keys")
    assert code == 0
    assert "Slim.quant.weight.bits = 8  (int in 1..8)" in out


def copy(source, target, **damage):
    shutil.copytree(source, target)
    for name, content in damage.items():
        path = target / name.replace("__", ".")
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
    return target


def rows(path, *lines):
    path.mkdir()
    (path / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]), encoding="utf-8")
    (path / "dev.tsv").write_text("sentence\tlabel\na good film\tpositive\na bad film\tnegative\n", encoding="utf-8")
    return path


GOOD = ("a good film\tpositive", "a bad film\tnegative")

# (what is wrong, the change to the config, part of the message)
TRAIN_MISTAKES = [
    ("unknown key", lambda t, m: {"Train": {"epoch": 1}}, "Train.epoch: unknown key"),
    ("impossible value", lambda t, m: {"Train": {"batch_size": 0}}, "Train.batch_size: 0 is not in"),
    ("unknown method", lambda t, m: {"Slim": {"lsq": {}}}, "Slim.lsq: unknown key"),
    (
        "unknown quantizer",
        lambda t, m: {"Slim": {"quant": {"weight": {"quantizer": "x"}}}},
        "'x' is not one of binary, lsq, minmax, ternary",
    ),
    ("rule without effect", lambda t, m: {"Slim": {"quant": {"layers": [["conv", "skip"]]}}}, "'conv' has no effect"),
    ("bad regex", lambda t, m: {"Slim": {"quant": {"layers": [["(", "skip"]]}}}, "not a regular expression"),
    ("bad target", lambda t, m: {"Slim": {"kurtosis": {"targets": {"cap": 0}}}}, "not a target policy"),
    ("no such model", lambda t, m: {"Model": {"name_or_path": str(t / "none")}}, "none"),
    (
        "model without config",
        lambda t, m: {"Model": {"name_or_path": str(copy(m, t / "m", config__json=None))}},
        "config.json",
    ),
    (
        "model without vocab",
        lambda t, m: {"Model": {"name_or_path": str(copy(m, t / "m", vocab__txt=None))}},
        "vocab.txt",
    ),
    (
        "weights cut short",
        lambda t, m: {"Model": {"name_or_path": str(copy(m, t / "m", model_state__pdparams=b"\x80\x02}"))}},
        "model_state.pdparams",
    ),
    ("no data", lambda t, m: {"Data": {"path": None}}, "Data.path"),
    ("missing data folder", lambda t, m: {"Data": {"path": str(t / "none")}}, "none"),
    ("missing data file", lambda t, m: {"Data": {"train": "x.tsv"}}, "x.tsv"),
    ("empty train file", lambda t, m: {"Data": {"path": str(rows(t / "d"))}}, "train.tsv"),
    ("label not in train", lambda t, m: {"Data": {"path": str(rows(t / "d", GOOD[0], "x\tneutral"))}}, "dev.tsv:3"),
    ("unlisted label", lambda t, m: {"Data": {"labels": ["negative", "neutral"]}}, "train.tsv:"),
    (
        "wrong column count",
        lambda t, m: {"Data": {"path": str(rows(t / "d", *GOOD, "three\tcells\there"))}},
        "train.tsv:4",
    ),
    ("missing label", lambda t, m: {"Data": {"path": str(rows(t / "d", *GOOD, "no label\t"))}}, "train.tsv:4"),
    ("unknown column", lambda t, m: {"Data": {"text": "review"}}, "review"),
    ("gpu without CUDA", lambda t, m: {"Global": {"device": "gpu"}}, "Global.device"),
]


@pytest.mark.parametrize(
    ("change", "message"), [row[1:] for row in TRAIN_MISTAKES], ids=[row[0] for row in TRAIN_MISTAKES]
)
def test_a_training_mistake_gets_one_clear_message(tool, tmp_path, tiny_ernie, tiny_task, change, message):
    config = write_config(tmp_path / "c.yaml", tiny_ernie, tiny_task, tmp_path / "run", **change(tmp_path, tiny_ernie))
    code, _, err = tool("train", "-c", config)
    assert code == 2
    assert message in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def damaged(done, tmp_path, name, content):
    """A copy of the artifact with one file changed."""
    folder = tmp_path / "artifact"
    shutil.copytree(done / "run/inference", folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content((folder / name).read_bytes()))
    return folder


OTHER_MISTAKES = [
    ("no config", lambda d, t: ["train", "-c", t / "none.yaml"], "none.yaml: no such config file"),
    ("bad override", lambda d, t: ["train", "-c", d / "c.yaml", "-o", "Train.epochs"], "not of the form key.sub=value"),
    ("run exists", lambda d, t: ["train", "-c", d / "c.yaml"], "already holds a run"),
    (
        "nothing to resume",
        lambda d, t: ["train", "-c", d / "c.yaml", "--resume", "-o", f"Global.output_dir={t}"],
        "no run to resume",
    ),
    ("export of no run", lambda d, t: ["export", "--run", t], "not a run folder"),
    (
        "PTQ with a training method",
        lambda d, t: ["export", "-o", "Slim.squat={}", "--model", d, "--calibration", d, "--output", t / "a"],
        "Slim.squat: it only does something in training",
    ),
    (
        "eval of nothing",
        lambda d, t: ["eval", "--model", t / "none", "--data", t],
        "no such run, model folder or artifact",
    ),
    ("eval without data", lambda d, t: ["eval", "--model", d / "run", "--data", t / "none.tsv"], "none.tsv"),
    (
        "output is no artifact",
        lambda d, t: ["export", "--run", d / "run", "--output", t],
        "exists and is no artifact",
    ),
    (
        "calibration missing",
        lambda d, t: ["export", "--model", d / "run/best_model", "--calibration", t / "x.tsv", "--output", t / "o"],
        "x.tsv",
    ),
    (
        "verification data empty",
        lambda d, t: ["export", "--run", d / "run", "--output", t / "o", "--verify", empty(t / "e.txt")],
        "e.txt",
    ),
    (
        "hash mismatch",
        lambda d, t: ["eval", "--model", damaged(d, t, "inference.pdiparams", flip), "--data", d],
        "sha256",
    ),
    (
        "artifact cut short",
        lambda d, t: ["eval", "--model", damaged(d, t, "inference.pdmodel", lambda b: b[:-9]), "--data", d],
        "bytes",
    ),
    (
        "artifact file missing",
        lambda d, t: ["eval", "--model", damaged(d, t, "vocab.txt", None), "--data", d],
        "missing",
    ),
    (
        "manifest unreadable",
        lambda d, t: ["eval", "--model", damaged(d, t, "manifest.json", lambda b: b"{"), "--data", d],
        "not valid JSON",
    ),
]


def flip(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def empty(path):
    path.write_text("\n")
    return path


@pytest.mark.parametrize(
    ("command", "message"), [row[1:] for row in OTHER_MISTAKES], ids=[row[0] for row in OTHER_MISTAKES]
)
def test_any_other_mistake_gets_one_clear_message(tool, tmp_path, done, command, message):
    code, _, err = tool(*command(done, tmp_path))
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_run_without_its_quantizer_state_is_named(tool, tmp_path, done):
    run = tmp_path / "run"
    shutil.copytree(done / "run", run)
    (run / "best_model/quantizers.npz").write_bytes(b"PK")
    code, _, err = tool("export", "--run", run, "--output", tmp_path / "o")
    assert (code, "quantizers.npz: unreadable" in err) == (2, True)
    (run / "best_model/quantizers.npz").unlink()
    code, _, err = tool("export", "--run", run, "--output", tmp_path / "o")
    assert (code, "quantizers.npz: missing" in err) == (2, True)


def test_over_long_texts_are_cut_and_counted(tool, tmp_path, tiny_ernie, tiny_task):
    data = rows(tmp_path / "d", *GOOD, "good " * 500 + "\tpositive")
    config = write_config(
        tmp_path / "c.yaml", tiny_ernie, tiny_task, tmp_path / "run", Data={"path": str(data)}, Train={"max_steps": 1}
    )
    code, out, _ = tool("train", "-c", config)
    assert code == 0
    assert "cut to Data.max_length 32: 1 train, 0 dev rows" in out


def test_ctrl_c_leaves_a_run_that_resumes(tool, tmp_path, tiny_ernie, tiny_task):
    config = write_config(tmp_path / "c.yaml", tiny_ernie, tiny_task, tmp_path / "run", Train={"epochs": 40})
    command = [sys.executable, str(ROOT / "tools/train.py"), "-c", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch:"):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume continues" in out
    step = json.loads(max((tmp_path / "run/checkpoints").glob("step_*/state.json")).read_text())["progress"]["step"]
    assert 4 <= step < 320
    code, out, _ = tool("train", "-c", config, "--resume")
    assert code == 0
    assert f"resumed at step {step}/320" in out
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 320


def test_a_full_disk_is_one_message_and_loses_nothing(tmp_path, tiny_ernie, tiny_task):
    """Files limited to 100 kB stand for a full disk: the checkpoint cannot be written."""
    config = write_config(tmp_path / "c.yaml", tiny_ernie, tiny_task, tmp_path / "run", Train={"max_steps": 2})
    limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (100_000, 100_000)); "
    code = limit + f"import runpy, sys; sys.argv = ['train', '-c', {str(config)!r}]; "
    code += f"runpy.run_path({str(ROOT / 'tools/train.py')!r}, run_name='__main__')"
    environment = {**os.environ, "ERNIE_KQAT_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert "best_model" not in left
    assert not [name for name in left if ".new." in name]
    assert "resolved.yaml" in left


def test_every_shipped_config_runs_on_a_tiny_ernie(tool, tmp_path, tiny_ernie, tiny_task):
    makers = {
        "regression": make_regression,
        "multilabel": make_multilabel,
        "tokens": make_entities,
        "qa": make_questions,
    }
    data = {"classification": tiny_task, **{task: make(tmp_path / task, rows=64) for task, make in makers.items()}}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        output, task = tmp_path / path.stem, yaml.safe_load(path.read_text())["Data"].get("task", "classification")
        local = [f"Global.output_dir={output}", f"Model.name_or_path={tiny_ernie}", f"Data.path={data[task]}"]
        local += ["Data.max_length=32", "Data.train_rows=64", "Train.max_steps=2"]
        if "pretrained:" in path.read_text():
            local.append(f"Model.pretrained={tiny_ernie}")
        if "teacher:" in path.read_text():
            local.append(f"Slim.distill.teacher={tiny_ernie}")
        code, _, err = tool("train", "-c", path, "-o", *local)
        assert code == 0, f"{path.name}: {err}"
        assert np.isfinite(json.loads((output / "summary.json").read_text())[tasks.find(task).metrics[0]])
