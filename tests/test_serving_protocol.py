"""Requests are checked strictly, and errors say what to change."""

import json

import pytest

from ernie_kqat.serving import protocol
from ernie_kqat.serving.protocol import Invalid, Limits

LIMITS = Limits(max_texts=3, max_text_chars=10)


def parse(value, default="default"):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return protocol.parse(body, LIMITS, default)


def test_what_is_asked():
    assert parse({"text": "good"}).texts == ["good"]
    assert parse({"text": "a", "pair": "b"}).pairs == ["b"]
    question = parse({"texts": ["a", "b"], "pairs": ["c", "d"], "model": "x", "logits": True})
    assert (question.texts, question.pairs, question.model, question.logits) == (["a", "b"], ["c", "d"], "x", True)
    question = parse({"input_ids": [[1, 2], [3]], "token_type_ids": [[0, 1], [0]]})
    assert (question.input_ids, question.token_type_ids) == ([[1, 2], [3]], [[0, 1], [0]])
    assert question.texts is None
    assert parse({"text": "\U0001f600é"}).texts == ["\U0001f600é"]


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"", "empty_body", "a JSON object is needed"),
        (b"\xff{}", "invalid_json", "not UTF-8 text (at byte 0)"),
        ('{"text": "a"}'.encode("utf-16"), "invalid_json", "not UTF-8"),
        (b"{", "invalid_json", "not valid JSON"),
        (b"[" * 100_000, "invalid_json", "nested too deeply"),
        (b'{"text": "a", "logits": NaN}', "invalid_json", "NaN is no JSON"),
        (b'{"text": "a", "text": "b"}', "invalid_json", "a key is given twice"),
        (b'{"input_ids": [[1' + b"0" * 5000 + b"]]}", "invalid_json", "an integer of 5001 digits"),
        (b"[1]", "invalid_json", "a list; an object is needed"),
        (b'{"text": "\\ud800"}', "invalid_text", "text: half of a surrogate pair"),
        ({"text": "a", "top_k": 1}, "unknown_field", "field 'top_k' is not known; allowed: text, texts"),
        ({}, "wrong_fields", "exactly one of text, texts, input_ids is needed; found: none"),
        ({"text": "a", "texts": ["b"]}, "wrong_fields", "found: text and texts"),
        ({"texts": ["a"], "pair": "b"}, "wrong_fields", "'pair' does not go with 'texts'; 'pairs' does"),
        ({"texts": ["a"], "token_type_ids": [[0]]}, "wrong_fields", "'token_type_ids' does not go with 'texts'"),
        ({"texts": "a"}, "wrong_type", "texts: a string found where a list is needed"),
        ({"texts": ["a", None]}, "wrong_type", "texts[1]: null found where a string is needed"),
        ({"text": 3}, "wrong_type", "text: a number found"),
        ({"text": "a", "pair": None}, "wrong_type", "pair: null found"),
        ({"text": "a", "model": 1}, "wrong_type", "model: a number found"),
        ({"text": "a", "logits": 1}, "wrong_type", "logits: a number found where true or false"),
        ({"texts": ["a", "b"], "pairs": ["c"]}, "wrong_length", "pairs: 1 for 2 texts; each needs one"),
        ({"texts": []}, "no_rows", "texts: the list is empty"),
        ({"texts": ["a"] * 4}, "too_many_rows", "texts: 4 rows; at most 3"),
        ({"texts": ["a", "b" * 11]}, "text_too_long", "texts[1]: 11 characters; at most 10"),
        ({"input_ids": [1, 2]}, "wrong_type", "input_ids[0]: a number found where a list of integers"),
        ({"input_ids": [[1, 2.0]]}, "wrong_type", "input_ids[0]: a number found where an integer"),
        ({"input_ids": [[1, True]]}, "wrong_type", "input_ids[0]: a boolean found"),
        ({"input_ids": [[1]], "token_type_ids": None}, "wrong_type", "token_type_ids: null found"),
    ],
)
def test_what_is_refused(body, code, message):
    with pytest.raises(Invalid) as failure:
        parse(body)
    assert failure.value.code == code
    assert message in failure.value.message
    assert failure.value.status == (413 if code in ("too_many_rows", "text_too_long") else 400)


def test_several_models_have_to_be_named():
    with pytest.raises(Invalid, match="'model' is needed"):
        parse({"text": "a"}, None)
    assert parse({"text": "a", "model": "b"}, None).model == "b"


def test_request_ids_of_clients_are_taken_only_if_harmless():
    assert protocol.request_id("a.B-9_") == "a.B-9_"
    for offered in (None, "", "a b", "a\n", "é", "x" * 65):
        made = protocol.request_id(offered)
        assert made != offered
        assert protocol.REQUEST_ID.fullmatch(made)


def test_an_answer_holds_logits_only_if_asked():
    labels = [("good", 0.75)]
    without = protocol.answer("m", "v", "id", 1.23456, labels, None)
    assert without == {
        "model": "m",
        "version": "v",
        "request_id": "id",
        "latency_ms": 1.235,
        "predictions": [{"label": "good", "score": 0.75}],
    }
    assert protocol.answer("m", "v", "id", 1.0, labels, [[1.0, 2.0]])["predictions"][0]["logits"] == [1.0, 2.0]
    with pytest.raises(ValueError, match="[Oo]ut of range"):
        protocol.encode({"score": float("nan")})
