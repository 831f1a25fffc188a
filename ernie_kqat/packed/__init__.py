"""Packed artifacts: an artifact folder as one small file, whose weights have their true bit width.

The file is a zip of named parts:

    packed.json            {format, version, parts: {name: {size_bytes, sha256}}, parameters: [{type, shape, grid}, …]}
    files/NAME             each file of the artifact folder but its parameters, as it is
    parameters/indices     of every low-bit matrix, one after the other (codes.py): which level each value is on
    parameters/levels      int8
    parameters/steps       float32, little-endian
    parameters/values      every other parameter as it is

What it expands to is the artifact folder, byte for byte. Nothing in here loads Paddle.
"""
