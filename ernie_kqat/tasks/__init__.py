"""Tasks: what rows become, what is trained, what is measured, and what an answer is.

One file a family; its name = `Data.task`. The serving side uses them too, so a file here loads neither Paddle nor anything of
the training side when it is imported: what reads data or makes tensors is imported where it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import plugins
from ..errors import UserError
from ..tokenizer import lacks_text

if TYPE_CHECKING:
    import paddle

    from ..data.columns import Example
    from ..data.tokenized import Split
    from ..tokenizer import Tokenizer

Answers = Sequence[Any]  # frozen dataclasses with `logits` and `fields()`, one a text


@dataclass(frozen=True)
class Task:
    """One family. The dataclass's fields are keys of `Data` that an artifact has to remember.

    Logits are float32 [positions, outputs] everywhere: one position a row where the answer comes from [CLS], one a token
    (row after row, without padding) where `per_token`. Here stands what tasks of whole sentences share.
    """

    model: ClassVar[str] = "ErnieForSequenceClassification"  # PaddleNLP's class with this head
    problem: ClassVar[str | None] = None  # problem_type in config.json
    fixed: ClassVar[tuple[str, ...]] = ()  # names of the outputs, where they are not found in the data
    metrics: ClassVar[tuple[str, ...]] = ()  # the first is Train.metric's default, and what a summary names
    suffixes: ClassVar[tuple[str, ...]] = (".tsv", ".csv", ".jsonl")  # of train and dev files
    per_token: ClassVar[bool] = False
    named: ClassVar[bool] = True  # whether PaddleNLP's data sets (Data.name) can be read

    # rows

    def read(
        self, path: Path, text: str | None, text_pair: str | None, label: str | None, require_label: bool
    ) -> Iterable[Example]:
        """The examples of a file; `text`, `text_pair` and `label` name columns."""
        from ..data.readers import ExampleReader

        return ExampleReader(path, text, text_pair, label, require_label)

    def labels_in(self, example: Example) -> Iterable[str]:
        """The labels that an example carries, for `outputs`."""
        return ()

    def outputs(self, known: Sequence[str] | None, found: Iterable[str]) -> list[str]:
        """The outputs' names in order: from Data.labels or the data set's own (`known`), or from those found in train."""
        if known:
            raise UserError(f"Data.labels: {', '.join(known)}: a task of kind {kind(self)} has none")
        return list(self.fixed)

    def targets(self, examples: Sequence[Example], labels: Sequence[str], numbers_are_ids: bool) -> Any:
        """What `loss` is given of labelled examples: an array [rows, …], or an array [tokens] a row."""
        raise NotImplementedError

    def split(
        self,
        examples: Sequence[Any],
        labels: Sequence[str] | None,
        tokenizer: Tokenizer,
        max_length: int,
        name: str,
        cache_dir: str | Path | None = None,
        numbers_are_ids: bool = True,
    ) -> Split:
        """Token ids of examples, and their targets where `labels` are given."""
        from ..data.tokenized import tokenize

        targets = None if labels is None else self.targets(examples, labels, numbers_are_ids)
        return tokenize(examples, targets, tokenizer, max_length, name, cache_dir)

    # training

    def loss(self, logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
        """The scalar that is trained; logits [rows, outputs] or [rows, tokens, outputs] of one padded batch."""
        raise NotImplementedError

    def choices(self, logits: paddle.Tensor, real: paddle.Tensor) -> paddle.Tensor:
        """The batch's logits as [choices, alternatives], of which a softmax is taken; real: 1 for tokens, 0 for padding."""
        return logits

    def imitation(
        self, student: paddle.Tensor, teacher: paddle.Tensor, temperature: float, real: paddle.Tensor
    ) -> paddle.Tensor:
        """How far the student's logits are from the teacher's: what distillation trains."""
        from ..methods.distill import soft_cross_entropy

        return soft_cross_entropy(self.choices(student, real), self.choices(teacher, real), temperature)

    def margins(self, logits: paddle.Tensor, real: paddle.Tensor) -> paddle.Tensor:
        """[choices]: by how much each answer wins, which needs no label; BRECQ asks for its gradient."""
        import paddle

        largest, _ = paddle.topk(self.choices(logits, real), 2, axis=1)
        return largest[:, 0] - largest[:, 1]

    # measuring

    def metric(self, chosen: str | None, labels: Sequence[str]) -> str:
        """The metric to choose the best model by; UserError where the task has none of that name."""
        if chosen is not None and chosen not in self.metrics:
            raise UserError(f"Train.metric: {chosen}: Data.task {kind(self)} has {', '.join(self.metrics)}")
        return chosen or self.metrics[0]

    def scores(self, logits: np.ndarray, split: Split, labels: Sequence[str]) -> dict[str, float]:
        """Each of `metrics` by name, of the logits of a labelled split."""
        raise NotImplementedError

    def agreement(self, found: np.ndarray, reference: np.ndarray, split: Split) -> float:
        """Share of equal answers, 0..1: what an export's verification asks for."""
        raise NotImplementedError

    # answering

    def encode(
        self, tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
    ) -> Sequence[Any]:
        """Each text as rows for the model: objects with `windows`, a list of (input_ids, token_type_ids)."""
        return tokenizer.encode(texts, pairs, max_length)

    def lacks_text(self, row: Any) -> bool:
        """Whether there is nothing in a row of `encode` to judge."""
        return lacks_text(row)

    def answers(self, logits: np.ndarray, rows: Sequence[Any], labels: Sequence[str]) -> Answers:
        """The answer to each row of `encode`; logits: of all their windows."""
        raise NotImplementedError

    def served(self, logits: np.ndarray, labels: Sequence[str]) -> list[tuple[str, float]]:
        """(label, score) of each row, as the HTTP and gRPC service says it; never asked of a `per_token` task."""
        raise NotImplementedError

    def manifest(self) -> dict[str, Any]:
        """What an artifact remembers, as `of_manifest` reads it."""
        return {"kind": kind(self), **dataclasses.asdict(self)}


def names() -> list[str]:
    """The kinds of tasks there are."""
    return plugins.names(__name__)


def find(name: str) -> type[Task]:
    """The Task of tasks/<name>.py."""
    cls = plugins.defined(__name__, name, Task)
    assert cls is not None, f"tasks/{name}.py defines no Task"
    return cls


def kind(task: Task) -> str:
    """The name of a task's file."""
    return type(task).__module__.rpartition(".")[2]


def of_data(data: Any) -> Task:
    """The task of a config's Data section."""
    cls = find(data.task)
    return cls(**{field.name: getattr(data, field.name) for field in dataclasses.fields(cls)})


def of_manifest(manifest: Mapping[str, Any]) -> Task:
    """The task of an artifact; classification where its manifest, being older, names none."""
    described = dict(manifest.get("task") or {"kind": "classification"})
    name = described.pop("kind", None)
    if name not in names():
        raise UserError(f"the artifact's task is {name!r}; this version knows {', '.join(names())}")
    unknown = set(described) - {field.name for field in dataclasses.fields(find(name))}
    if unknown:
        raise UserError(
            f"the artifact's task {name} has {', '.join(sorted(unknown))}, which this version does not know"
        )
    return find(name)(**described)


def of_model(model: Any) -> Task:
    """The task of a model in memory (models/loading.py marks it), with default options."""
    return find(getattr(model, "task", "classification"))()


def kind_of_settings(architectures: Sequence[str] | None, problem: str | None, num_labels: int) -> str:
    """Which task a model folder's config.json is of; classification where it does not say."""
    if problem is None and num_labels == 1:
        problem = "regression"
    for name in names():
        cls = find(name)
        if cls.model != Task.model and cls.model in (architectures or ()):
            return name
        if cls.problem is not None and cls.problem == problem and Task.model in (architectures or (Task.model,)):
            return name
    return "classification"


def only_classification(task: Task, what: str) -> None:
    """UserError where `what` is of classification only and the task is another one."""
    if kind(task) != "classification":
        raise UserError(f"{what} is for classification; the model's task is {kind(task)}")
