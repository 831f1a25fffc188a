"""Ten thousand malformed requests, mixed with good ones: does the service crash, hang, leak, or answer a good one wrongly?

Every malformed request has to be answered by a status 4xx (or, where the HTTP itself is broken, by a closed connection),
without a word of the server's paths, packages or classes; every good one rightly. Memory and open files are compared before
and after, both after a round of good requests. gRPC gets its own share. Ends with one JSON line."""

from __future__ import annotations

import asyncio
import collections
import random
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import serving_malformed as malformed
import serving_rig as rig

from ernie_kqat.serving import messages

AT_ONCE = 16
GOOD_CLIENTS = 2
BODY_TIMEOUT_S = 3  # a slow sender is given up by then
HANG_S = 30.0
DRIBBLED = 8  # bytes
TOLERANCE = 1e-3
SLOW_SHARE, GRPC_SHARE = 0.01, 0.1
GROWTH_MB = 50.0  # of all processes together
LEAKS = (
    b"Traceback",
    b".py",
    b"aiohttp",
    b"paddle",
    b"numpy",
    b"Exception",
    b"Error(",
    b"/usr",
    b"/tmp",
    b"/home",
    b"site-packages",
)
GRPC_REFUSED = ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "OUT_OF_RANGE")


@dataclass
class Tally:
    """How many requests of each kind met which end, and what went wrong."""

    outcomes: dict[str, collections.Counter] = field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    wrong: list[str] = field(default_factory=list)
    good: collections.Counter = field(default_factory=collections.Counter)

    def add(self, kind: str, outcome: str, right: bool, detail: bytes = b"") -> None:
        self.outcomes[kind][outcome] += 1
        if not right:
            self.wrong.append(f"{kind}: {outcome}: {detail[:300]!r}")


def main() -> int:
    arguments = rig.arguments(__doc__, requests=(10_000, "malformed requests"), workers=(2, "worker processes"))
    texts = rig.read_texts(arguments.data)
    labels, logits = rig.expected(arguments.model, texts)
    options = ["--workers", arguments.workers, "--body-timeout-s", BODY_TIMEOUT_S]
    with rig.serving(arguments.model, *options) as server:
        questions = rig.Questions(server, texts, labels, logits, TOLERANCE)
        leaks = (*LEAKS, str(rig.ROOT).encode(), str(Path(arguments.model).resolve()).encode())
        found = asyncio.run(fuzz(server, questions, arguments.requests, leaks))
        found["worker_restarts"] = server.metric("ernie_kqat_worker_restarts_total")
        found["alive"] = server.process.poll() is None
        executed = b"a pickle was executed" in server.log.read_bytes()
    passed = found["alive"] and not (found["wrong_count"] or found["good"].get("wrong") or executed)
    passed = (
        passed
        and not found["worker_restarts"]
        and found["growth"]["rss_mb"] <= GROWTH_MB
        and found["growth"]["files"] <= rig.FILES_OF_A_START
    )
    return rig.report("fuzz", found, arguments.json, passed)


async def fuzz(server: rig.Server, questions: rig.Questions, count: int, leaks: tuple[bytes, ...]) -> dict[str, Any]:
    tally, done, start = Tally(), asyncio.Event(), time.perf_counter()
    await good(server, questions, Tally(), min(1000, count))
    await asyncio.sleep(1)
    before = total(server)
    askers = [asyncio.create_task(good(server, questions, tally, None, done)) for _ in range(GOOD_CLIENTS)]
    over_grpc, slow = int(count * GRPC_SHARE), int(count * SLOW_SHARE)
    await asyncio.gather(
        over_http(server, tally, count - over_grpc - slow, leaks),
        slowly(server, tally, slow, leaks),
        over_garbage_grpc(server, tally, over_grpc, leaks),
    )
    done.set()
    await asyncio.gather(*askers)
    await good(server, questions, tally, min(1000, count))
    await asyncio.sleep(BODY_TIMEOUT_S + 1)  # what was left half open is given up by then
    after = total(server)
    return {
        "requests": sum(sum(kind.values()) for kind in tally.outcomes.values()),
        "seconds": round(time.perf_counter() - start, 1),
        "good": dict(tally.good),
        "wrong_count": len(tally.wrong),
        "wrong": tally.wrong[:20],
        "outcomes": {kind: dict(sorted(ends.items())) for kind, ends in sorted(tally.outcomes.items())},
        "before": before,
        "after": after,
        "growth": {name: round(after[name] - before[name], 1) for name in before},
    }


def total(server: rig.Server) -> dict[str, float]:
    held = server.held().values()
    return {name: round(sum(one[name] for one in held), 1) for name in ("rss_mb", "files")}


async def good(
    server: rig.Server, questions: rig.Questions, tally: Tally, count: int | None, done: asyncio.Event | None = None
) -> None:
    """Good requests one after the other: `count`, or until `done`."""
    async with rig.connections(server.http, 1) as (connection,):
        while not (done and done.is_set()) and (count is None or count > 0):
            count = None if count is None else count - 1
            index, request = questions.draw()
            status, body = await connection.send(request)
            right = status == 200 and questions.right(index, body)
            tally.good["right" if right else "wrong"] += 1
            if not right:
                print(f"good request, wrong answer: {status} {body[:300]!r}", file=sys.stderr)


async def over_http(server: rig.Server, tally: Tally, count: int, leaks: tuple[bytes, ...]) -> None:
    kinds = list(malformed.kinds().items())
    attempts = iter([(number, *kinds[number % len(kinds)]) for number in range(count)])

    async def sender() -> None:
        for number, name, kind in attempts:
            await one_attempt(server, tally, name, kind(random.Random(number)), leaks)

    await asyncio.gather(*(sender() for _ in range(AT_ONCE)))


async def slowly(server: rig.Server, tally: Tally, count: int, leaks: tuple[bytes, ...]) -> None:
    attempts = [malformed.slow(random.Random(number)) for number in range(count)]
    for start in range(0, count, 2 * AT_ONCE):
        some = attempts[start : start + 2 * AT_ONCE]
        await asyncio.gather(*(one_attempt(server, tally, "slow", attempt, leaks) for attempt in some))


async def one_attempt(
    server: rig.Server, tally: Tally, name: str, attempt: malformed.Attempt, leaks: tuple[bytes, ...]
) -> None:
    try:
        answer = await asyncio.wait_for(exchange(server.http, attempt), HANG_S)
    except asyncio.TimeoutError:
        tally.add(name, "hang", False, attempt.content)
        return
    if not answer:
        tally.add(name, "closed", attempt.may_close, attempt.content)
        return
    try:
        status = int(answer.split(b" ", 2)[1])
    except (ValueError, IndexError):
        tally.add(name, "no HTTP", False, answer)
        return
    leaked = any(leak in answer for leak in leaks)
    right = status in attempt.allowed and not leaked
    tally.add(name, f"{status}{' leaks' if leaked else ''}", right, attempt.content[:150] + b" -> " + answer)


async def exchange(address: str, attempt: malformed.Attempt) -> bytes:
    """All that comes back until the first answer is whole or the connection is closed."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        if attempt.manner == "slow":
            return await dribble(reader, writer, attempt.content)
        writer.write(attempt.content)
        if attempt.manner == "abandon":
            return b""
        if attempt.manner == "half_close":
            writer.write_eof()
        return await read_one(reader)  # a refusal may come before the end of a huge body
    finally:
        if not writer.transport.is_closing():
            rude = attempt.manner == "abandon" and len(attempt.content) % 2
            writer.transport.abort() if rude else writer.close()


async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, content: bytes) -> bytes:
    """All but the last bytes at once, then one every 0.2 s, until the server has had enough."""
    reading = asyncio.create_task(read_one(reader))
    writer.write(content[:-DRIBBLED])
    for byte in content[-DRIBBLED:]:
        if reading.done():
            break
        writer.write(bytes([byte]))
        await asyncio.wait([reading], timeout=0.2)
    return await reading


async def read_one(reader: asyncio.StreamReader) -> bytes:
    try:
        head = b"HTTP/1.1 100"
        while head.startswith(b"HTTP/1.1 100"):  # 100 Continue, which the server also sends to see who is still there
            head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        return head + (await reader.readexactly(int(length)) if length.strip().isdigit() else b"")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except (OSError, asyncio.LimitOverrunError):
        return b""


async def over_garbage_grpc(server: rig.Server, tally: Tally, count: int, leaks: tuple[bytes, ...]) -> None:
    async with grpc.aio.insecure_channel(server.grpc, options=[("grpc.enable_http_proxy", 0)]) as channel:
        for number in range(count):
            rng = random.Random(number)
            if number % 20 == 0:
                garbage_bytes(server.grpc, rng)
                tally.add("grpc_garbage", "sent", True)
                continue
            method, content = grpc_attempt(rng)
            try:
                await channel.unary_unary(method)(content, timeout=HANG_S)
                tally.add("grpc", "OK", parses(content), content)
            except grpc.RpcError as error:
                code, text = error.code().name, (error.details() or "").encode()
                tally.add(
                    "grpc",
                    code,
                    code in GRPC_REFUSED and not any(leak in text for leak in leaks),
                    text + b" <- " + content,
                )


def grpc_attempt(rng: random.Random) -> tuple[str, bytes]:
    """A method and the bytes of its message."""
    row = messages.Row(input_ids=[101, rng.choice([-1, 2**40, 2**63 - 1, 31_000_000]), 102])
    message = rng.choice(
        [
            messages.PredictRequest(),
            messages.PredictRequest(texts=[""]),
            messages.PredictRequest(texts=["a"], pairs=["b", "c"]),
            messages.PredictRequest(texts=["a"], model=rng.choice(["../../etc/passwd", "nobody"])),
            messages.PredictRequest(texts=["a"] * 100_000),
            messages.PredictRequest(texts=["a" * 2_000_000]),
            messages.PredictRequest(rows=[row]),
            messages.PredictRequest(rows=[messages.Row()]),
            messages.PredictRequest(texts=["a"], rows=[row]),
            messages.PredictRequest(rows=[messages.Row(input_ids=[101, 102], token_type_ids=[0, 9])]),
        ]
    ).SerializeToString()
    content = rng.choice([message, rng.randbytes(rng.randint(1, 500)), malformed.serialized(rng).content])
    unknown = ["/baidu.paddle_serving.pipeline_serving.PipelineService/inference", "/ernie_kqat.Classifier/X", "/x/y"]
    return (rng.choice(unknown) if rng.random() < 0.1 else messages.METHOD), content


def parses(content: bytes) -> bool:
    """Random bytes may be a message with a text in it, by chance."""
    try:
        return bool(messages.PredictRequest.FromString(content).texts)
    except Exception:  # noqa: BLE001  protobuf's DecodeError has another place in each version
        return False


def garbage_bytes(address: str, rng: random.Random) -> None:
    """Bytes that are no HTTP/2 to the gRPC port."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(
            rng.choice(
                [
                    b"GET / HTTP/1.1\r\n\r\n",
                    rng.randbytes(1000),
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(200),
                ]
            )
        )


if __name__ == "__main__":
    sys.exit(main())
