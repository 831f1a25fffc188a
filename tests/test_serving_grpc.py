"""gRPC: the same answers and the same errors; the messages are those of the .proto file."""

import re
from pathlib import Path

import numpy as np
import pytest
from artifacts import random_rows

import ernie_kqat.serving
from ernie_kqat import Predictor
from ernie_kqat.serving import messages
from ernie_kqat.serving.messages import PredictRequest, PredictResponse, Row

grpc = pytest.importorskip("grpc")


@pytest.fixture(scope="module")
def call(server):
    with grpc.insecure_channel(server.grpc) as channel:

        def ask(request, method=messages.METHOD, **options):
            body = request if isinstance(request, bytes) else request.SerializeToString()
            return channel.unary_unary(method)(body, timeout=30, **options)

        yield ask


def test_messages_are_those_of_the_proto_file():
    text = Path(ernie_kqat.serving.__file__).with_name("ernie_kqat.proto").read_text()
    found = {}
    for name, body in re.findall(r"^message (\w+) \{(.*?)^\}", text, re.DOTALL | re.MULTILINE):
        fields = re.findall(r"^\s*(repeated )?(\w+) (\w+) = (\d+);", body, re.MULTILINE)
        assert [int(number) for *_, number in fields] == list(range(1, len(fields) + 1))
        found[name] = [(field, kind, bool(repeated)) for repeated, kind, field, _ in fields]
    assert found == messages.CLASSIFIER


def test_answers_are_the_predictors(call, tiny_int8):
    model = Predictor(tiny_int8)
    texts = ["a good film", "a very dull plot"]
    found = PredictResponse.FromString(
        call(PredictRequest(texts=texts, logits=True), metadata=(("x-request-id", "g1"),))
    )
    assert found.request_id == "g1"
    for one, expected in zip(found.predictions, model.predict(texts)):
        assert one.label == expected.label
        np.testing.assert_allclose(one.logits, expected.logits, atol=1e-5)
    rows = random_rows(9, 150)
    request = PredictRequest(rows=[Row(input_ids=ids, token_type_ids=types) for ids, types in rows], logits=True)
    found = PredictResponse.FromString(call(request))
    np.testing.assert_allclose([one.logits for one in found.predictions], model.logits(rows), atol=1e-5)
    without = PredictResponse.FromString(call(PredictRequest(rows=[Row(input_ids=[7, 8])])))
    assert list(without.predictions[0].logits) == []


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        (b"\xff\xff", "INVALID_ARGUMENT", "invalid_message: "),
        (b"\x0a\x02\xff\xfe", "INVALID_ARGUMENT", "invalid_message: "),
        (PredictRequest(), "INVALID_ARGUMENT", "wrong_fields: either 'texts' or 'rows'"),
        (PredictRequest(texts=["a"], rows=[Row(input_ids=[1])]), "INVALID_ARGUMENT", "wrong_fields: "),
        (PredictRequest(texts=[""]), "INVALID_ARGUMENT", "empty_text: texts[0]"),
        (PredictRequest(texts=["a"], pairs=["b"]), "INVALID_ARGUMENT", "pairs_superfluous: "),
        (PredictRequest(rows=[Row(input_ids=[10**6])]), "INVALID_ARGUMENT", "id_out_of_range: input_ids[0]"),
        (PredictRequest(rows=[Row()]), "INVALID_ARGUMENT", "wrong_length: input_ids[0]: 0 tokens"),
        (PredictRequest(texts=["a"], model="x"), "NOT_FOUND", "unknown_model: "),
        (PredictRequest(texts=["a"] * 257), "RESOURCE_EXHAUSTED", "too_many_rows: "),
        (PredictRequest(texts=["a" * 1_100_000]), "RESOURCE_EXHAUSTED", "body_too_large: "),
        (PredictRequest(texts=["a" * 3_000_000]), "RESOURCE_EXHAUSTED", ""),
    ],
)
def test_errors(call, request_, status, text):
    with pytest.raises(grpc.RpcError) as failure:
        call(request_)
    assert failure.value.code() == grpc.StatusCode[status]
    assert failure.value.details().startswith(text)


def test_health(call):
    answer = messages.HealthCheckResponse.FromString(call(b"", method=f"/{messages.HEALTH_SERVICE}/Check"))
    assert answer.status == messages.SERVING
    with pytest.raises(grpc.RpcError) as failure:
        call(messages.HealthCheckRequest(service="x"), method=f"/{messages.HEALTH_SERVICE}/Check")
    assert failure.value.code() == grpc.StatusCode.NOT_FOUND
