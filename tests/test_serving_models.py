"""What may be served is decided before any worker starts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from artifacts import make_artifact

from ernie_kqat import Predictor, UserError, artifact, files
from ernie_kqat.serving import models
from ernie_kqat.serving.protocol import Invalid, Question


@pytest.fixture
def copy(tiny_int8, tmp_path):
    return Path(shutil.copytree(tiny_int8, tmp_path / "copy"))


def test_labels_and_scores_are_the_predictors(tiny_int8):
    (model,) = models.load({"a": tiny_int8})
    predictor = Predictor(tiny_int8)
    texts = ["a good film", "very dull", "[SEP] is a token"]
    expected = predictor.predict(texts)
    found = model.label(np.array([one.logits for one in expected], np.float32))
    for (label, score), one in zip(found, expected):
        assert label == one.label
        assert score == pytest.approx(one.score, abs=1e-12)
    rows = model.encode(Question("a", False, texts=texts))
    assert [row.tolist() for row in rows] == [[one.input_ids, one.token_type_ids] for one in predictor.encode(texts)]


def test_versions_change_with_any_file(tiny_int8, copy, tiny_fp32):
    assert models.version(copy) == models.version(tiny_int8) != models.version(tiny_fp32)


def test_a_changed_file_is_refused(copy):
    with open(copy / artifact.PARAMS, "r+b") as file:
        file.write(b"\xff")
    with pytest.raises(UserError, match="model 'a': .*sha256"):
        models.load({"a": copy})


def test_a_second_program_is_refused(copy):
    (copy / "a.pdmodel").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds a\.pdmodel, inference"):
        models.load({"a": copy})


def test_an_artifact_without_servings_description_is_refused(copy):
    manifest = artifact.read_manifest(copy)
    del manifest["files"][artifact.SERVING_CONF]
    files.write_json(copy / artifact.MANIFEST, manifest)
    with pytest.raises(UserError, match="has no serving_server_conf.prototxt; export it again"):
        models.load({"a": copy})


def test_an_unverified_artifact_is_refused(tmp_path, tiny_ernie):
    folder = make_artifact(tmp_path / "unverified", tiny_ernie, "fp32", verification=None)
    with pytest.raises(UserError, match="never verified"):
        models.load({"a": folder})


def test_models_are_found_by_name(tiny_int8, tiny_fp32):
    served = models.load({"a": tiny_int8, "b": tiny_fp32})
    assert models.named(served, "b").folder == tiny_fp32.resolve()
    with pytest.raises(Invalid, match='model "c" is not served; served: a, b'):
        models.named(served, "c")
