"""Compressed bytes, a bounded piece at a time: 98 kB of .zst can hold 1 GB."""

import bz2
import lzma
import zipfile
import zlib
from collections.abc import Generator, Iterator
from tarfile import TarError

import zstandard

DECOMPRESSED_BYTES = 1 << 20  # handed on at once, whatever a file promises
DECOMPRESSOR_BYTES = 1 << 31  # memory of a decompressor: `zstd --long=31` needs all of it, `xz -9` 64 MB
# One byte of zstd can stand for 32 kB, and zstandard returns whatever its input holds: 1 kB at a time is at most 32 MB.
ZSTD_BYTES = 1 << 10
DECOMPRESSORS = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(memlimit=DECOMPRESSOR_BYTES),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=DECOMPRESSOR_BYTES).decompressobj(),
}
# What data raises that cannot be read further: broken, cut short, encrypted, or packed in a way that is not known here.
BROKEN = (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError, TarError, zipfile.BadZipFile)


def decompressed(blocks: Iterator[bytes], suffix: str) -> Iterator[bytes]:
    """The content of a file, or of several in a row, in bounded pieces; `blocks` itself if its suffix is no compression's.

    Raises:
      One of BROKEN.
    """
    return _decompressed(blocks, suffix) if suffix in DECOMPRESSORS else blocks


def _decompressed(blocks: Iterator[bytes], suffix: str) -> Iterator[bytes]:
    member = None  # compressed files may be several, one behind the other
    for block in blocks:
        while block:
            member = member or DECOMPRESSORS[suffix]()
            block = yield from _pieces(member, block, suffix)
            if member.eof:
                member, block = None, block.lstrip(b"\0")
    if member is not None:
        raise EOFError("the file ends too early")


def _pieces(member, block: bytes, suffix: str) -> Generator[bytes, None, bytes]:
    """What a block holds, in bounded pieces; returns what stands behind the end of the compressed member."""
    if suffix == ".zst":
        for start in range(0, len(block), ZSTD_BYTES):
            yield member.decompress(block[start : start + ZSTD_BYTES])
            if member.eof:
                return member.unused_data + block[start + ZSTD_BYTES :]
        return b""
    while True:
        try:
            piece = member.decompress(block, DECOMPRESSED_BYTES)
        except OSError as error:  # what bz2 raises for broken data
            raise EOFError(error) from error
        yield piece
        # zlib gives back the input that it has not used; the others keep it and say so.
        block = member.unconsumed_tail if suffix == ".gz" else b""
        all_used = len(piece) < DECOMPRESSED_BYTES and not block if suffix == ".gz" else member.needs_input
        if member.eof or all_used:
            return member.unused_data if member.eof else b""
