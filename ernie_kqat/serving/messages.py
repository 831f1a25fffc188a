"""The messages of ernie_kqat.proto, and of gRPC's standard health service, made at import: no generated code to keep.

A test holds them against the .proto file. Needs protobuf only, neither gRPC nor Paddle.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "ernie_kqat.Classifier"
METHOD = f"/{SERVICE}/Predict"
HEALTH_SERVICE = "grpc.health.v1.Health"

# name -> [(field, type, repeated)], numbered from 1
CLASSIFIER: dict[str, list[tuple[str, str, bool]]] = {
    "PredictRequest": [
        ("texts", "string", True),
        ("pairs", "string", True),
        ("rows", "Row", True),
        ("model", "string", False),
        ("logits", "bool", False),
    ],
    "Row": [("input_ids", "int64", True), ("token_type_ids", "int64", True)],
    "PredictResponse": [
        ("model", "string", False),
        ("version", "string", False),
        ("request_id", "string", False),
        ("latency_ms", "double", False),
        ("predictions", "Prediction", True),
    ],
    "Prediction": [("label", "string", False), ("score", "double", False), ("logits", "float", True)],
}
HEALTH: dict[str, list[tuple[str, str, bool]]] = {
    "HealthCheckRequest": [("service", "string", False)],
    "HealthCheckResponse": [("status", "int32", False)],  # an enum on the wire is an int32
}
SERVING, NOT_SERVING = 1, 2

_POOL = descriptor_pool.DescriptorPool()


def _classes(package: str, messages: dict[str, list[tuple[str, str, bool]]]) -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for number, (field, kind, repeated) in enumerate(fields, 1):
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            one = message.field.add(name=field, number=number, label=label)
            if kind in messages:
                one.type, one.type_name = kinds.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                one.type = getattr(kinds, f"TYPE_{kind.upper()}")
    _POOL.Add(file)
    factory = message_factory.MessageFactory(_POOL)
    return {name: factory.GetPrototype(_POOL.FindMessageTypeByName(f"{package}.{name}")) for name in messages}


PredictRequest, Row, PredictResponse, Prediction = _classes("ernie_kqat", CLASSIFIER).values()
HealthCheckRequest, HealthCheckResponse = _classes("grpc.health.v1", HEALTH).values()
