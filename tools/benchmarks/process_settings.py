"""What the process settings of ernie_kqat/runtime.py are worth: one matmul, one addition, one training step.

Processes with and without them, in turn; medians of the best time in each. Ends with one JSON line."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

PLAIN = "--plain"


def measure(plain: bool) -> dict[str, float]:
    """Milliseconds, best of 20, in this process."""
    if plain:
        import zlib  # noqa: F401  paddle 2.6.2 needs it first
    else:
        import ernie_kqat  # noqa: F401
    import paddle

    x, w = paddle.randn([640, 384]), paddle.randn([384, 1536])
    layer = paddle.nn.TransformerEncoderLayer(384, 12, 1536, dropout=0.0, activation="gelu")
    tokens = paddle.randn([32, 20, 384])

    def step():
        layer(tokens).sum().backward()
        layer.clear_gradients()

    works = {"matmul_ms": lambda: paddle.matmul(x, w), "add_ms": lambda: w + w, "encoder_layer_step_ms": step}
    figures = {}
    for name, work in works.items():
        times = []
        for _ in range(20):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        figures[name] = 1e3 * min(times)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind")
    parser.add_argument(PLAIN, choices=["yes", "no"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        print(json.dumps(measure(arguments.plain == "yes")))
        return
    found: dict[str, list[dict]] = {"yes": [], "no": []}
    environment = {key: value for key, value in os.environ.items() if key != "MKL_DEBUG_CPU_TYPE"}
    for _ in range(arguments.repeats):
        for plain, rows in found.items():
            command = [sys.executable, __file__, PLAIN, plain]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    report = {}
    for name in found["yes"][0]:
        before, after = (statistics.median(row[name] for row in found[plain]) for plain in ("yes", "no"))
        report[name] = {"without": round(before, 3), "with": round(after, 3), "ratio": round(before / after, 2)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
