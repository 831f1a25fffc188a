"""Answer texts with an artifact: from arguments, a file or standard input, to JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from ernie_kqat import cli
from ernie_kqat.errors import UserError, run_tool

EPILOG = """examples:
  python tools/infer.py -c configs/quickstart.yaml "a gripping, beautifully acted film"
  python tools/infer.py --model output/RUN/inference "a gripping, beautifully acted film" "a dull film"
  python tools/infer.py --model output/RUN/inference --file sentences.txt > answers.jsonl
  zcat sentences.txt.gz | python tools/infer.py --model output/RUN/inference --file - | head
  python tools/infer.py --model output/PAIRS/inference "is it raining ?" "it rains ."       one pair

A file is UTF-8 text with one sentence a line; for a model of pairs, two sentences with a tab between them. Of a file with
more columns or a header take what is meant first:  tail -n +2 dev.tsv | cut -f1 | python tools/infer.py … --file -

Each line of input gives one line of output, in order:
  {"text": "a dull film", "label": "negative", "score": 0.98}          score: the label's probability
  {"line": 3, "error": "no text in it; an empty sentence has no label"}
Of a model for questions a line is question, tab, context. What other tasks than classification answer: docs/tasks.md.
Files of any size are read as they are answered. Exit code 0: all answered. 1: some lines have errors. 2: wrong input."""

MAX_BATCH = 1024


def main() -> int:
    parser = cli.parser(__doc__, EPILOG)
    parser.add_argument("text", nargs="*", help="the sentences; for a model of pairs: first second first second …")
    parser.add_argument(
        "--model",
        metavar="ARTIFACT",
        help="of tools/export.py, or packed; default: the one of -c's run",
    )
    parser.add_argument("--file", metavar="FILE", help="read the sentences from FILE; - is standard input")
    parser.add_argument(
        "--logits", action="store_true", help="also print the logits, in the order of the model's labels"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=32,
        metavar="N",
        help="rows of one forward (default 32); 1: answer each line at once",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="cores to use (default: as tools/tune.py found, or 1)")
    parser.add_argument(
        "--allow-unverified", action="store_true", help="use an artifact that was not verified, or failed"
    )
    arguments = parser.parse_args()
    if bool(arguments.text) == bool(arguments.file):
        parser.error("give texts, or --file FILE" + (", not both" if arguments.text else ""))
    if not 1 <= arguments.batch <= MAX_BATCH:
        parser.error(f"--batch {arguments.batch} is not in 1..{MAX_BATCH}")
    from ernie_kqat.infer import answer_lines  # Paddle takes a second to load; --help should not wait for it
    from ernie_kqat.predictor import Predictor

    predictor = Predictor(cli.artifact_of(arguments), arguments.threads, arguments.allow_unverified)
    typed = arguments.file == "-" and sys.stdin.isatty()  # whoever types a line waits for its answer
    source = (
        _lines(arguments.file) if arguments.file else contextlib.nullcontext(_given(arguments.text, predictor.pair))
    )
    with source as lines:
        return _print(answer_lines(predictor, lines, arguments.batch, 1 if typed else None, arguments.logits))


def _given(texts: list[str], pair: bool) -> list[bytes]:
    """Arguments as the lines that a file would have."""
    if pair and len(texts) % 2:
        raise UserError(f"the model judges pairs: {len(texts)} texts cannot be paired")
    joined = map("\t".join, zip(texts[::2], texts[1::2])) if pair else texts
    return [os.fsencode(line) for line in joined]


@contextlib.contextmanager
def _lines(file: str) -> Iterator[Iterable[bytes]]:
    quiet = True if sys.stdout.isatty() else None  # on a terminal the answers show the progress
    with contextlib.nullcontext(sys.stdin.buffer) if file == "-" else open(file, "rb") as stream:
        yield tqdm(stream, desc="infer", unit=" lines", disable=quiet)


def _print(windows: Iterable[list[dict]]) -> int:
    """Print the answers as they come, always as UTF-8; 1 if any line had an error."""
    errors = 0
    try:
        for answers in windows:
            errors += sum("error" in answer for answer in answers)
            text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
            sys.stdout.buffer.write(text.encode("utf-8"))
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
    if errors:
        print(f"lines without an answer: {errors}; their output says why", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    run_tool(main)
