"""Ask a running service (tools/serve.py): sentences from arguments, a file or standard input, answers as JSON lines or TSV."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from ernie_kqat.errors import UserError, run_tool
from ernie_kqat.serving.client import Client, ServiceError, connect
from ernie_kqat.serving.lines import answer_lines

EPILOG = """examples:
  python tools/client.py "a gripping, beautifully acted film" "a dull film"
  python tools/client.py --url grpc://127.0.0.1:8867 --connections 4 --file sentences.txt > answers.jsonl
  cut -f1 pairs.tsv | python tools/client.py --format tsv --file -
  python tools/client.py --token-file token.txt --model movies "a dull film"

A sentence with a tab in it is a pair of sentences. Each line gives one line of output, in order:
  {"text": "a dull film", "label": "negative", "score": 0.98}          TSV: label, score, sentence
  {"line": 3, "error": "texts[0]: no text in it; an empty sentence has no label"}
Exit code 0: all answered. 1: some lines have errors. 2: wrong input, or the service does not answer."""


def main() -> int:
    arguments = parse()
    try:
        with client(arguments) as service, source(arguments) as lines:
            return write(answer_lines(service, lines, arguments.model, arguments.logits), arguments.format)
    except ServiceError as error:
        raise UserError(str(error)) from None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", nargs="*", help="the sentences")
    parser.add_argument("--file", metavar="FILE", help="read the sentences from FILE, one a line; - is standard input")
    parser.add_argument(
        "--url", default="http://127.0.0.1:8866", help="http, https, grpc or grpcs (default %(default)s)"
    )
    parser.add_argument("--token-file", metavar="FILE", help="a file with the service's token")
    parser.add_argument("--model", default="default", metavar="NAME", help="the model's name in the service")
    parser.add_argument("--logits", action="store_true", help="also print the logits, in the order of the labels")
    parser.add_argument("--format", choices=("json", "tsv"), default="json", help="of the output (default json)")
    parser.add_argument(
        "--connections", type=int, default=1, metavar="N", help="requests under way at once (default 1)"
    )
    parser.add_argument("--retries", type=int, default=4, metavar="N", help="of a request, when overloaded (default 4)")
    parser.add_argument("--timeout-s", type=float, default=30.0, metavar="S", help="for one request (default 30)")
    arguments = parser.parse_args()
    if bool(arguments.text) == bool(arguments.file):
        parser.error("give sentences, or --file FILE" + (", not both" if arguments.text else ""))
    return arguments


def client(arguments: argparse.Namespace) -> Client:
    token = Path(arguments.token_file).read_text(encoding="utf-8").strip() if arguments.token_file else None
    return connect(
        arguments.url,
        token,
        timeout_s=arguments.timeout_s,
        retries=arguments.retries,
        connections=arguments.connections,
    )


def source(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[Iterable[bytes]]:
    if arguments.file == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    return open(arguments.file, "rb") if arguments.file else contextlib.nullcontext(map(os.fsencode, arguments.text))


def write(windows: Iterable[list[dict]], kind: str) -> int:
    """Print the answers as they come, always as UTF-8; 1 if any line had an error."""
    errors = 0
    try:
        for answers in windows:
            failed = [answer for answer in answers if "error" in answer]
            errors += len(failed)
            if kind == "tsv":
                print(
                    *(f"line {answer['line']}: {answer['error']}\n" for answer in failed),
                    sep="",
                    end="",
                    file=sys.stderr,
                )
            text = "".join(
                (tsv(one) if kind == "tsv" else json.dumps(one, ensure_ascii=False)) + "\n" for one in answers
            )
            sys.stdout.buffer.write(text.encode("utf-8"))
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
    return 1 if errors else 0


def tsv(answer: dict) -> str:
    """label, score, the logits if asked for, sentence, its pair; all empty for a line with an error."""
    logits = map(str, answer.get("logits", ()))
    cells = [answer.get("label", ""), str(answer.get("score", "")), *logits, answer.get("text", ""), answer.get("pair")]
    return "\t".join(cell for cell in cells if cell is not None)


if __name__ == "__main__":
    run_tool(main)
