"""A tiny random ERNIE with a real WordPiece vocabulary, and a toy sentiment task that it learns in seconds."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import numpy as np
import paddle

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
POSITIVE = ["good", "great", "fine", "lovely", "funny", "brilliant", "moving", "fresh"]
NEGATIVE = ["bad", "awful", "poor", "boring", "dull", "stupid", "weak", "stale"]
NOUNS = ["film", "movie", "story", "plot", "actor", "scene", "music", "script"]
ADVERBS = ["very", "really", "quite", "so", "rather"]
OTHER = ["the", "a", "an", "is", "was", "and", "it", "this", "that", "of", "to", "in", "not", "but", "i", "we", "they"]
SUFFIXES = ["##s", "##ing", "##ed", "##ly", "##er"]
CHINESE_POSITIVE = "好美喜爱棒"
CHINESE_NEGATIVE = "坏差丑恨烂"
CHINESE_NOUNS = ["电影", "故事", "音乐", "酒店", "书"]
CHINESE_OTHER = "的是很真非常这那个了不"


def tiny_vocabulary() -> list[str]:
    """Word pieces in order of their ids: every ASCII letter, digit and mark, common words, some Chinese characters."""
    letters = list(string.ascii_lowercase + string.digits)
    pieces = SPECIAL + letters + ["##" + letter for letter in letters] + list(string.punctuation) + SUFFIXES
    pieces += POSITIVE + NEGATIVE + NOUNS + ADVERBS + OTHER
    pieces += list(CHINESE_POSITIVE + CHINESE_NEGATIVE + "".join(CHINESE_NOUNS) + CHINESE_OTHER + "，。！")
    return list(dict.fromkeys(pieces))


def make_tiny_ernie(
    folder: str | Path,
    seed: int = 0,
    num_labels: int = 2,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    intermediate: int = 64,
    hidden_act: str = "gelu",
    use_task_id: bool = False,
    task_id: int = 0,
    max_positions: int = 128,
    layer_norm_eps: float = 1e-12,
    head: bool = True,
) -> Path:
    """Write a PaddleNLP model folder with random weights of trained-like size; `head=False`: an encoder only, with keys
    that lack `ernie.`, as the pretrained checkpoints of old PaddleNLP releases have them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = tiny_vocabulary()
    config = {
        "architectures": ["ErnieForSequenceClassification" if head else "ErnieModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": hidden_act,
        "hidden_dropout_prob": 0.1,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "layer_norm_eps": layer_norm_eps,
        "max_position_embeddings": max_positions,
        "model_type": "ernie",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "task_id": task_id,
        "task_type_vocab_size": 3,
        "type_vocab_size": 2,
        "use_task_id": use_task_id,
        "vocab_size": len(vocabulary),
    }
    if head:
        config["id2label"] = {str(index): f"LABEL_{index}" for index in range(num_labels)}
        config["label2id"] = {f"LABEL_{index}": index for index in range(num_labels)}
    weights = _random_weights(config, num_labels, np.random.default_rng(seed))
    if not head:
        weights = {name[len("ernie.") :]: value for name, value in weights.items() if name.startswith("ernie.")}
    paddle.save(
        {name: paddle.to_tensor(value) for name, value in weights.items()}, str(folder / "model_state.pdparams")
    )
    special = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    _write_json(folder / "config.json", config)
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json", {"do_lower_case": True, **special, "tokenizer_class": "ErnieTokenizer"}
    )
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return folder


def make_tiny_task(
    folder: str | Path, rows: int = 256, seed: int = 0, pair: bool = False, chinese: bool = False
) -> Path:
    """Write train.tsv (`rows` rows) and dev.tsv (a quarter as many): `sentence` and `label`, where one word decides
    between `negative` and `positive`; with `pair`, `sentence1`, `sentence2`, and the word stands in the second."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    sentence = _chinese_sentence if chinese else _english_sentence
    for name, count in (("train", rows), ("dev", max(rows // 4, 1))):
        lines = ["sentence1\tsentence2\tlabel" if pair else "sentence\tlabel"]
        for index in range(count):
            positive = index % 2 == 1
            columns = [sentence(rng, None)] if pair else []
            lines.append("\t".join([*columns, sentence(rng, positive), "positive" if positive else "negative"]))
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _random_weights(config: dict, num_labels: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    weights: dict[str, np.ndarray] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        weights[f"{name}.weight"] = rng.normal(0, inputs**-0.5, (inputs, outputs))
        weights[f"{name}.bias"] = rng.normal(0, 0.1, outputs)

    def layer_norm(name: str) -> None:
        weights[f"{name}.weight"] = rng.normal(1, 0.1, hidden)
        weights[f"{name}.bias"] = rng.normal(0, 0.1, hidden)

    tables = {"word": config["vocab_size"], "position": config["max_position_embeddings"]}
    tables["token_type"] = config["type_vocab_size"]
    if config["use_task_id"]:
        tables["task_type"] = config["task_type_vocab_size"]
    for name, size in tables.items():
        spread = 0.5 if name == "word" else 0.1
        weights[f"ernie.embeddings.{name}_embeddings.weight"] = rng.normal(0, spread, (size, hidden))
    weights["ernie.embeddings.word_embeddings.weight"][config["pad_token_id"]] = 0.0  # Paddle's padding_idx
    layer_norm("ernie.embeddings.layer_norm")
    for index in range(config["num_hidden_layers"]):
        layer = f"ernie.encoder.layers.{index}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{projection}", hidden, hidden)
        linear(f"{layer}.linear1", hidden, intermediate)
        linear(f"{layer}.linear2", intermediate, hidden)
        layer_norm(f"{layer}.norm1")
        layer_norm(f"{layer}.norm2")
    linear("ernie.pooler.dense", hidden, hidden)
    linear("classifier", hidden, num_labels)
    return {name: value.astype("float32") for name, value in weights.items()}


def _english_sentence(rng: random.Random, positive: bool | None) -> str:
    words = [rng.choice(["the", "this", "that"]), rng.choice(NOUNS), rng.choice(["is", "was"])]
    if rng.random() < 0.5:
        words.append(rng.choice(ADVERBS))
    if positive is None:
        words += ["a", rng.choice(NOUNS)]
    else:
        words.append(rng.choice(POSITIVE if positive else NEGATIVE))
    if rng.random() < 0.5:
        words += [rng.choice(["and", "but"]), "it", "was", "a", rng.choice(NOUNS)]
    return " ".join(words) + rng.choice([".", " !", ""])


def _chinese_sentence(rng: random.Random, positive: bool | None) -> str:
    start = rng.choice("这那") + "个" + rng.choice(CHINESE_NOUNS)
    if positive is None:
        return start + "是" + rng.choice(CHINESE_NOUNS) + rng.choice("。！")
    middle = rng.choice(["很", "真", "非常"])
    return (
        start + middle + rng.choice(CHINESE_POSITIVE if positive else CHINESE_NEGATIVE) + rng.choice(["。", "！", "了"])
    )


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
