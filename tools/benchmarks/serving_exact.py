"""Are the answers of 8 clients at once those of the bare Predictor? Over HTTP and gRPC, with 1 and 2 workers.

First all rows of the data by each protocol, then many mixed requests (texts one or more, token ids, sentences of any length),
each answer compared with its own text's. The labels have to be equal, the logits to 1e-5. The simulation's labels and logits
are those that the artifact's verification kept. Ends with one JSON line."""

from __future__ import annotations

import concurrent.futures
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import serving_rig as rig

from ernie_kqat.artifact import read_manifest
from ernie_kqat.serving.client import Client, connect

CLIENTS = 8
TOLERANCE = 1e-5
LARGEST_REQUEST = 8  # texts


class Comparison:
    """Counts what differs; used by many threads."""

    def __init__(self, labels: list[str], logits: np.ndarray):
        self.labels, self.logits = labels, logits
        self._lock = threading.Lock()
        self.answers = self.wrong_labels = self.wrong_logits = 0
        self.largest_difference = 0.0

    def add(self, rows: list[int], predictions: list) -> None:
        difference = np.abs(np.array([one.logits for one in predictions]) - self.logits[rows]).max(axis=1)
        with self._lock:
            self.answers += len(rows)
            self.wrong_labels += sum(one.label != self.labels[row] for row, one in zip(rows, predictions))
            self.wrong_logits += int((difference > TOLERANCE).sum())
            self.largest_difference = max(self.largest_difference, float(difference.max()))

    def figures(self) -> dict[str, Any]:
        return {
            "answers": self.answers,
            "wrong_labels": self.wrong_labels,
            "wrong_logits": self.wrong_logits,
            "largest_difference": self.largest_difference,
        }

    @property
    def exact(self) -> bool:
        return self.answers > 0 and not self.wrong_labels and not self.wrong_logits


def main() -> int:
    arguments = rig.arguments(__doc__, requests=(20_000, "mixed requests, over both protocols and worker counts"))
    texts = rig.read_texts(arguments.data)
    labels, logits = rig.expected(arguments.model, texts)
    rows_of_ids = token_ids(arguments.model, texts)
    found: dict[str, Any] = {"rows": len(texts), "clients": CLIENTS, "requests": arguments.requests}
    exact = []
    for workers in (1, 2):
        with rig.serving(arguments.model, "--workers", workers) as server:
            for name, url in (("http", f"http://{server.http}"), ("grpc", f"grpc://{server.grpc}")):
                rows, mixed = Comparison(labels, logits), Comparison(labels, logits)
                with connect(url, retries=0) as client:
                    run(all_rows(client, texts, rows))
                    run(mixed_requests(client, texts, rows_of_ids, mixed, arguments.requests // 4))
                found[f"{name}_workers_{workers}"] = {"rows": rows.figures(), "mixed": mixed.figures()}
                exact += [rows.exact, mixed.exact]
    found["simulation"] = simulation(arguments.model, texts, labels, logits)
    return rig.report("exact", found, arguments.json, all(exact))


def token_ids(model: str, texts: list[str]) -> list[list[int]]:
    from ernie_kqat.predictor import Predictor

    return [row.input_ids for row in Predictor(model).encode(texts)]


def run(tasks: list[Callable[[], None]]) -> None:
    """All tasks, by CLIENTS threads."""
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()


def all_rows(client: Client, texts: list[str], comparison: Comparison) -> list[Callable[[], None]]:
    """Each row once, one text a request and many, in turn."""
    tasks, start, rng = [], 0, random.Random(1)
    while start < len(texts):
        rows = list(range(start, min(start + rng.choice((1, LARGEST_REQUEST)), len(texts))))
        tasks.append(lambda rows=rows: comparison.add(rows, client.predict([texts[row] for row in rows], logits=True)))
        start = rows[-1] + 1
    return tasks


def mixed_requests(
    client: Client, texts: list[str], ids: list[list[int]], comparison: Comparison, count: int
) -> list[Callable[[], None]]:
    def ask(seed: int) -> None:
        rng = random.Random(seed)
        rows = [rng.randrange(len(texts)) for _ in range(rng.choice((1, 1, 1, 2, 3, LARGEST_REQUEST)))]
        if rng.random() < 0.25:
            answers = client.predict_ids([ids[row] for row in rows], logits=True)
        else:
            answers = client.predict([texts[row] for row in rows], logits=True)
        comparison.add(rows, answers)

    return [lambda seed=seed: ask(seed) for seed in range(count)]


def simulation(model: str, texts: list[str], labels: list[str], logits: np.ndarray) -> dict[str, Any]:
    """The artifact's own comparison with the training-time model, and how far this run's logits are from what it kept."""
    verification = read_manifest(model)["verification"]
    kept = [row for row in verification.get("worst", ()) if row["text"] in texts]
    rows = [texts.index(row["text"]) for row in kept]
    found = {name: verification.get(name) for name in ("data", "samples", "agreement", "rms_over_std")}
    if rows:
        found["largest_difference_from_kept_deployed"] = float(
            np.abs(logits[rows] - np.array([row["deployed"] for row in kept])).max()
        )
        found["largest_difference_from_kept_simulated"] = float(
            np.abs(logits[rows] - np.array([row["simulated"] for row in kept])).max()
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
