"""PaddleNLP's model names. What PaddleNLP has cached of one is enough to load it without a network."""

from __future__ import annotations

import difflib
import logging
import os
import shutil
import tempfile
from pathlib import Path

from paddlenlp.transformers import ErnieConfig, ErnieForSequenceClassification, ErnieTokenizer
from paddlenlp.utils.download import resolve_file_path
from paddlenlp.utils.env import MODEL_HOME

from .. import files
from ..errors import UserError
from .folder import CONFIG, VOCABULARY, WEIGHTS

log = logging.getLogger(__name__)


def local_folder(name_or_path: str) -> Path | None:
    """The folder that a path names; None for a model name that PaddleNLP knows.

    Raises UserError for a path that is not a folder, and for a name that PaddleNLP does not know as an ERNIE.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name_or_path}: is a file; a model folder is needed ({CONFIG}, {WEIGHTS}, {VOCABULARY})")
    if "/" in name_or_path or name_or_path.startswith((".", "~")):
        raise UserError(f"{name_or_path}: no such folder")
    known = ErnieConfig.pretrained_init_configuration
    if name_or_path not in known:
        close = difflib.get_close_matches(name_or_path, known, 1)
        hint = f"did you mean {close[0]}?" if close else "for instance ernie-2.0-base-en or ernie-3.0-medium-zh"
        raise UserError(f"{name_or_path}: neither a folder here nor an ERNIE that PaddleNLP knows; {hint}")
    return None


def vocabulary(name: str) -> Path:
    """PaddleNLP's cache folder of a model name, complete but for the weights: vocab.txt and config.json."""
    folder = Path(MODEL_HOME, name)
    if not (folder / VOCABULARY).is_file():
        url = ErnieTokenizer.pretrained_resource_files_map["vocab_file"][name]
        cached = (
            folder / url.rsplit("/", 1)[-1]
        )  # where PaddleNLP itself puts it, under names such as ernie_3.0_base_zh_vocab.txt
        if cached.is_file():
            shutil.copyfile(cached, folder / VOCABULARY)
        else:
            _fetch(name, url, folder / VOCABULARY)
    if not (folder / CONFIG).is_file():
        files.write_json(folder / CONFIG, {**ErnieConfig.pretrained_init_configuration[name], "model_type": "ernie"})
    return folder


def complete(name: str) -> Path:
    """PaddleNLP's cache folder of a model name with its weights too: a whole model folder, which can be copied."""
    folder = vocabulary(name)
    if not (folder / WEIGHTS).is_file():
        url = ErnieForSequenceClassification.pretrained_resource_files_map["model_state"][name]
        _fetch(name, url, folder / WEIGHTS)
    return folder


def _fetch(name: str, url: str, target: Path) -> None:
    """Download one file of a model. Raises UserError with both ways out when the hub does not answer."""
    log.info("%s: fetching %s into %s", name, target.name, target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    # PaddleNLP leaves its temporary files behind when it fails: in a folder of ours they go with it.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch.") as scratch:
        try:
            fetched = resolve_file_path(name, [url], cache_dir=scratch)
        except (OSError, ValueError) as error:
            cause = error.__context__ or error
            if getattr(cause, "errno", None):  # this machine's disk, not the network
                raise cause from None
            raise UserError(
                f"{name}: not in PaddleNLP's cache ({MODEL_HOME}), and its hub cannot be reached "
                f"({type(cause).__name__}). Two ways out: run this once where the network reaches it and keep that "
                "cache (PPNLP_HOME names its parent), or use a model folder: -o Model.name_or_path=DIR"
            ) from None
        os.replace(fetched, target)
