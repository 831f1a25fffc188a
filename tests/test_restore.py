"""Which fp32 model a run is compared with."""

import shutil

import pytest

from ernie_kqat import config
from ernie_kqat.restore import restore_run
from ernie_kqat.trainer import train


def run_of(folder, start, data, slim):
    brief = {"max_steps": 1, "learning_rate": 1e-3, "eval_steps": 1}
    tree = {
        "Global": {"output_dir": str(folder)},
        "Model": {"name_or_path": str(start)},
        "Data": {"path": str(data), "max_length": 32},
        "Slim": slim,
        "Train": brief,
    }
    train(config.from_overrides((), tree))
    return folder


@pytest.fixture(scope="module")
def fp32(tiny_ernie, tiny_task, tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("restore") / "fp32", tiny_ernie, tiny_task, None) / "best_model"


def test_a_run_is_compared_with_the_model_that_it_began_from(fp32, tiny_task, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_task.parent)  # the same folder by another name
    run = run_of(tmp_path / "qat", fp32, tiny_task.name, {"quant": {}})
    assert restore_run(run).fp32 == str(fp32)
    assert restore_run(run, fp32="other").fp32 == "other"


def test_but_not_where_that_one_is_of_other_data(fp32, tiny_task, tmp_path):
    other = shutil.copytree(tiny_task, tmp_path / "other")
    run = run_of(tmp_path / "qat", fp32, other, {"quant": {}})
    assert restore_run(run).fp32 == str(run / "best_model")
