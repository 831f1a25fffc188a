"""Messages between front and workers arrive whole, however the bytes are cut."""

import socket

import numpy as np
import pytest

from ernie_kqat.serving import frames


def test_messages_cut_anywhere():
    batch = np.arange(24, dtype=np.int64).reshape(2, 3, 4)
    logits = np.array([[1.5, -2.5]], np.float32)
    data = frames.pack({"id": 1}, batch) + frames.pack({"ready": True}) + frames.pack({"id": 2}, logits)
    for step in (1, 7, 50, len(data)):
        decoder = frames.Decoder()
        found = [frame for start in range(0, len(data), step) for frame in decoder.feed(data[start : start + step])]
        assert [header.get("id") for header, _ in found] == [1, None, 2]
        assert np.array_equal(found[0][1], batch)
        assert found[1][1] is None
        assert found[2][1].dtype == np.float32
        assert np.array_equal(found[2][1], logits)


def test_over_a_socket():
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(frames.pack({"id": 3}, np.ones((2, 1, 4), np.int64)) + frames.pack({})[:5])
            header, batch = frames.read(theirs)
            assert header["id"] == 3
            assert batch.shape == (2, 1, 4)
        assert frames.read(theirs) is None  # cut within a message


@pytest.mark.parametrize(
    ("text", "payload"),
    [
        (b'{"type": "object", "shape": [1]}', bytes(8)),
        (b'{"type": "int64", "shape": [3]}', bytes(16)),
        (b'{"type": "int64", "shape": [1]}', bytes(7)),
        (b"{", b""),
    ],
)
def test_what_does_not_fit_is_refused(text, payload):
    with pytest.raises((ValueError, KeyError)):
        frames.unpack(text, payload)


def test_a_length_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at most"):
        list(frames.Decoder().feed(frames.SIZES.pack(2**31, 2**31)))
