"""One HTTP connection against slow, broken and large senders; no model behind it."""

import asyncio
import time

from aiohttp import web

from ernie_kqat.serving.connection import Server

HEADERS_S, IDLE_S = 4.0, 10.0
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
LARGE = POST % 800_000 + b"a" * 800_000


def conversations(*all_sent: tuple[bytes, ...]) -> tuple[list[tuple[bytes, float]], list[str]]:
    """What came back and after how many seconds the connection was closed, of each; and the errors counted.

    Each is a connection of its own, all at once; its parts are sent 0.2 s apart.
    """
    errors: list[str] = []

    async def handler(request):
        return web.Response(text=f"{len(await request.read())} bytes")

    async def one(port, sent):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        start = time.monotonic()
        for part in sent:
            writer.write(part)
            await asyncio.sleep(0.2)
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return answer, time.monotonic() - start

    async def run():
        server = Server(
            handler,
            100,
            10**6,
            HEADERS_S,
            errors.append,
            keepalive_timeout=IDLE_S,
            auto_decompress=False,
            access_log=None,
        )
        runner = web.ServerRunner(server)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        try:
            return await asyncio.gather(*(one(port, sent) for sent in all_sent))
        finally:
            await runner.cleanup()

    return asyncio.run(run()), errors


NEVER_WHOLE = [(b"G",), (b"POST /v1",), (b"\r\n",), (GET[:-2],), (GET[:9], GET[9:12])]
IN_TIME = {
    (GET,): 1,
    (GET[:5], GET[5:]): 1,
    (POST % 4, b"ab", b"cd"): 1,
    (GET, GET[:9], GET[9:]): 2,
    (GET + GET,): 2,
}


def test_headers_have_a_deadline_of_their_own():
    silent = ((b"",),)
    found, errors = conversations(*NEVER_WHOLE, *IN_TIME, *silent)
    seconds = dict(zip([*NEVER_WHOLE, *IN_TIME, *silent], found))
    for sent in NEVER_WHOLE:
        assert seconds[sent][0] == b""
        assert seconds[sent][1] < IDLE_S
    for sent, answers in IN_TIME.items():
        assert seconds[sent][0].count(b" 200 OK") == answers
        assert seconds[sent][1] >= IDLE_S
    assert seconds[silent[0]][1] >= IDLE_S
    assert errors == ["slow_request"] * len(NEVER_WHOLE)


def test_large_bodies_sent_at_once_are_all_read():
    """Parts of them come between the headers and the start of the handler: they are no headers."""
    found, errors = conversations(*[(LARGE,)] * 30)
    assert [answer.endswith(b"800000 bytes") for answer, _ in found] == [True] * 30
    assert errors == []
