"""An ERNIE of any size with random weights and another model's vocabulary: as fast and as large as a trained one."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from ernie_kqat.errors import UserError, run_tool

FILES = ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", required=True, metavar="DIR", help="a model folder: its vocabulary and its settings")
    parser.add_argument("--layers", type=int, default=12, metavar="N")
    parser.add_argument("--hidden", type=int, default=768, metavar="N", help="a multiple of 64, the width of a head")
    parser.add_argument("--output", required=True, metavar="DIR", help="the new model folder")
    arguments = parser.parse_args()
    like, output = Path(arguments.like), Path(arguments.output)
    if arguments.layers < 1 or arguments.hidden < 64 or arguments.hidden % 64:
        parser.error("--layers: 1 or more; --hidden: a multiple of 64")
    if output.exists():
        raise UserError(f"{output}: exists; name a new folder")
    import paddle
    from paddlenlp.transformers import ErnieConfig, ErnieForSequenceClassification

    from ernie_kqat.models.folder import CONFIG, read_json

    settings = {
        **read_json(like / CONFIG),
        "num_hidden_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "intermediate_size": 4 * arguments.hidden,
        "num_attention_heads": arguments.hidden // 64,
    }
    paddle.seed(0)
    model = ErnieForSequenceClassification(ErnieConfig(**settings))
    rng = np.random.default_rng(0)
    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.Linear):  # as wide as a trained one's: logits that differ from row to row
            layer.weight.set_value(rng.normal(0, 0.04, layer.weight.shape).astype(np.float32))
    output.mkdir(parents=True)
    paddle.save(model.state_dict(), str(output / "model_state.pdparams"))
    (output / CONFIG).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    for name in FILES:
        if (like / name).is_file():
            shutil.copyfile(like / name, output / name)
    print(f"{output}: {arguments.layers} layers, {arguments.hidden} wide, random weights")


if __name__ == "__main__":
    run_tool(main)
