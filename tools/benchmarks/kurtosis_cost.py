"""What kurtosis regularization costs: QAT steps with and without it, in turn, on one randomly initialized ERNIE.

Ends with one JSON line: `ratio` is the median of (a step with it / the step without it before), for `--apply`;
`autograd_ratio` the same for a penalty differentiated through mean, variance and fourth moment, for comparison."""

import argparse
import json
import statistics
import time

import numpy as np
import paddle
import paddle.nn.functional as F
from paddlenlp.transformers import ErnieConfig, ErnieForSequenceClassification

import ernie_kqat
from ernie_kqat import KurtosisQAT, machine

HEADS = {384: 12, 768: 12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384, choices=sorted(HEADS))
    parser.add_argument("--apply", choices=["loss", "decoupled"], default="loss")
    parser.add_argument("--granularity", choices=["tensor", "channel"], default="tensor")
    parser.add_argument("--every", type=int, default=1, help="regularize at each k-th step only")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20, help="pairs of steps (of `every` steps each)")
    parser.add_argument("--no-autograd", action="store_true", help="leave the comparison out")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    ways = ["without", arguments.apply] + ([] if arguments.no_autograd else ["autograd"])
    times: dict[str, list[float]] = {way: [] for way in ways}
    busy: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats + 2):  # the first two warm up
        for way in ways:
            began = time.perf_counter(), time.process_time()
            for _ in range(arguments.every):
                bench.step(way)
            if repeat >= 2:
                times[way].append(time.perf_counter() - began[0])
                busy[way].append(time.process_time() - began[1])

    def ratio(way: str, of: dict[str, list[float]] = times) -> float:
        return round(statistics.median(a / b for a, b in zip(of[way], of["without"])), 4)

    found = {
        "ratio": ratio(arguments.apply),
        "cpu_time_ratio": ratio(arguments.apply, busy),  # steadier where others use the cores too
        "quartiles": [
            round(q, 4)
            for q in statistics.quantiles([a / b for a, b in zip(times[arguments.apply], times["without"])], n=4)
        ],
        **({} if arguments.no_autograd else {"autograd_ratio": ratio("autograd")}),
        "step_ms": round(1e3 * statistics.median(times["without"]) / arguments.every, 1),
        "matrices": len(bench.kurtosis.weights),
        "settings": vars(arguments),
        "ernie_kqat": ernie_kqat.__version__,
        "paddle": paddle.__version__,
        "machine": machine.machine()["cpu"],
    }
    print(json.dumps(found))


class Bench:
    """A model under QAT, one batch, and a step with or without regularization."""

    def __init__(self, arguments):
        paddle.seed(0)
        width = arguments.width
        settings = ErnieConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=arguments.layers,
            num_attention_heads=HEADS[width],
            use_task_id=False,
        )
        self.model = ErnieForSequenceClassification(settings)
        options = {
            "targets": {"cap": 2.5},
            "apply": arguments.apply,
            "granularity": arguments.granularity,
            "every": arguments.every,
        }
        self.qat = KurtosisQAT({"kurtosis": options})
        self.qat.quantize(self.model)
        self.kurtosis = self.qat.kurtosis
        self.optimizer = paddle.optimizer.AdamW(1e-5, parameters=self.model.parameters())
        rng = np.random.default_rng(0)
        self.ids = paddle.to_tensor(rng.integers(1000, 18000, (arguments.rows, arguments.tokens)))
        self.labels = paddle.to_tensor(rng.integers(0, 2, arguments.rows))
        self.model.train()

    def step(self, way: str) -> None:
        def gradients() -> dict:
            loss = F.cross_entropy(self.model(self.ids), self.labels)
            if way == "autograd":
                loss = loss + 1e-3 * self.autograd_penalty()
            loss.backward()
            return {}

        (self.kurtosis.wrap(gradients) if way == "loss" else gradients)()
        self.optimizer.step()
        self.optimizer.clear_grad()
        if way in ("loss", "decoupled"):
            self.kurtosis.after_step()

    def autograd_penalty(self) -> paddle.Tensor:
        """Mean of (K/2.5 - 1)^2 as anyone would write it first."""
        terms = []
        for weight in self.kurtosis.weights.values():
            z = (weight - weight.mean()) / weight.std(unbiased=False)
            terms.append(((z**4).mean() / 2.5 - 1) ** 2)
        return sum(terms) / len(terms)


if __name__ == "__main__":
    main()
