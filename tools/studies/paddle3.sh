#!/usr/bin/env bash
# The same artifact in Paddle 3.3.1's predictor: labels against 2.6.2's.
# Usage: bash tools/studies/paddle3.sh ARTIFACT SENTENCES.txt      (a sentence a line)
set -euo pipefail
cd "$(dirname "$0")/../.."
artifact=$1 sentences=$2 other=build/paddle3
mkdir -p build
if [ ! -x "$other/bin/python" ]; then
  python3 -m venv "$other"
  "$other/bin/pip" install --quiet --disable-pip-version-check paddlepaddle==3.3.1 "numpy<2" tokenizers==0.20.3 tqdm setuptools
fi
.venv/bin/python tools/infer.py --model "$artifact" --file "$sentences" --logits >build/paddle2.jsonl
PYTHONPATH=. "$other/bin/python" tools/infer.py --model "$artifact" --file "$sentences" --logits >build/paddle3.jsonl
.venv/bin/python - <<'PY'
import json

one, two = ([json.loads(line) for line in open(f"build/paddle{n}.jsonl", encoding="utf-8")] for n in (2, 3))
same = sum(a["label"] == b["label"] for a, b in zip(one, two))
largest = max(abs(p - q) for a, b in zip(one, two) for p, q in zip(a["logits"], b["logits"]))
print(f"{same} of {len(one)} labels equal, largest logit difference {largest:.4f}")
raise SystemExit(same != len(one) or len(one) != len(two))
PY
