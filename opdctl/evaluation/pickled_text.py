"""Text in a pickle, read without unpickling. Imports no torch.

A pickle is a program. Here it is a fixed sequence of bytes instead, as Python writes it for a str by protocol 2 to 5:
an optional frame, the length and the UTF-8 of the text, an optional memo, a stop. Everything else is refused.
"""

import re
import zlib

FRAME = rb"(?:\x95.{8})?"
HEAD_PATTERN = re.compile(rb"\x80[\x02-\x05]" + FRAME + rb"(?:\x8c(.)|X(.{4})|\x8d(.{8}))", re.DOTALL)
"""The protocol and the length of the text, in 1, 4 or 8 bytes, little-endian."""
TAIL_PATTERN = re.compile(FRAME + rb"(?:\x94|q.|r.{4})?\.", re.DOTALL)


def read_pickled_text(data: bytes) -> str:
    """Return the text in a pickle of one str. Raises ValueError if it is anything else."""
    head = HEAD_PATTERN.match(data)
    if head is None:
        raise ValueError("not a pickle of a text")
    end = head.end() + int.from_bytes(head[head.lastindex or 0], "little")
    if end > len(data) or not TAIL_PATTERN.fullmatch(data, end):
        raise ValueError("not a pickle of one text, or truncated")
    return data[head.end() : end].decode()


def decompress(data: bytes, max_bytes: int) -> bytes:
    """Return what zlib compressed. Raises ValueError if it is more than `max_bytes`, corrupt or truncated."""
    decoder = zlib.decompressobj()
    try:
        content = decoder.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(content) > max_bytes:
        raise ValueError(f"inflates to more than {max_bytes} bytes")
    if not decoder.eof or decoder.unused_data:
        raise ValueError("truncated, or followed by other data")
    return content
