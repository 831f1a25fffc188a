"""An encoder folder with a data set's characters as its vocabulary and new word embeddings: to fine-tune on another language.

No package holds Chinese pretrained weights. So the encoder stays as pretrained, outliers and all; only its words are new: every
character in at least `--least` rows of train, with random embeddings of the old ones' mean and standard deviation."""

import collections
import shutil
from pathlib import Path

import numpy as np
import paddle

from ernie_kqat import cli, files
from ernie_kqat.data.readers import read_examples
from ernie_kqat.errors import UserError, run_tool
from ernie_kqat.models import folder
from ernie_kqat.models.loading import ENCODER

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "embeddings.word_embeddings.weight"


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="the encoder")
    parser.add_argument("--train", required=True, metavar="FILE", help="rows whose characters become words")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--least", type=int, default=2, metavar="N", help="rows that a character must be in; default 2")
    arguments = parser.parse_args()
    source, target = Path(arguments.model), Path(arguments.output)
    if target.exists():
        raise UserError(f"{target}: exists; name a new folder")
    words = vocabulary((row.text for row in read_examples(arguments.train)), arguments.least)
    weights = folder.read_weights(folder.find(source, folder.WEIGHTS))
    name = WORDS if WORDS in weights else ENCODER + WORDS
    old = weights[name]
    weights[name] = (
        np.random.default_rng(0).normal(old.mean(), old.std(), [len(words), old.shape[1]]).astype(np.float32)
    )
    with files.replacing_folder(target) as new:
        for path in source.glob("*.json"):
            shutil.copyfile(path, new / path.name)
        files.write_json(new / folder.CONFIG, {**folder.read_json(source / folder.CONFIG), "vocab_size": len(words)})
        files.write_text(new / folder.VOCABULARY, "\n".join(words) + "\n")
        paddle.save({key: paddle.to_tensor(value) for key, value in weights.items()}, str(new / folder.WEIGHTS))
    print(f"{target}: {len(words)} words")
    return 0


def vocabulary(texts, least: int) -> list[str]:
    """Special tokens, and each character in at least `least` texts, alone and as the inside of a word, commonest first."""
    counts = collections.Counter(character for text in texts for character in set(text.lower()) if character.strip())
    common = [character for character, count in counts.most_common() if count >= least]
    return [
        *SPECIAL,
        *common,
        *(f"##{character}" for character in common if character.isascii() and character.isalnum()),
    ]


if __name__ == "__main__":
    run_tool(main)
