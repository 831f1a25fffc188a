"""Serve exported models over HTTP and gRPC, computed by Paddle Serving in worker processes, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse

from ernie_kqat.errors import run_tool
from ernie_kqat.serving import settings

EPILOG = """examples:
  python tools/serve.py --model output/RUN/inference
  python tools/serve.py --model new=output/NEW/inference --model old=output/OLD/inference --token-file token.txt
  curl -H 'Content-Type: application/json' -d '{"text": "a dull film"}' http://127.0.0.1:8866/v1/predict

When it is ready it prints one JSON line with its addresses and process ids. Its log goes to standard error, or to --log-file.
Exit code 0: stopped by a signal, all accepted requests answered. 2: wrong input."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    settings.add_options(parser)
    chosen = settings.from_options(parser.parse_args())
    from ernie_kqat.serving import service  # after --help

    service.run(chosen)


if __name__ == "__main__":
    run_tool(main)
