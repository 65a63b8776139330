"""The members of tar and zip archives, one after the other and a bounded piece at a time. Nothing is unpacked to disk."""

import tarfile
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

READ_BYTES = 1 << 18
HEADER_BYTES = 1 << 24  # of one header of a tar, which is held; a header that promises more is broken or an attack

Member = tuple[str, Iterator[bytes]]  # its name in the archive, and its content


def tar_members(blocks: Iterator[bytes]) -> Iterator[Member]:
    """The files in a tar, in order. `blocks` is read once, forward; a member's content is to be read before the next one's.

    Raises:
      One of compression.BROKEN: the archive is broken, or ends too early.
    """
    stream = _Forward(blocks)
    archive = tarfile.TarFile(fileobj=stream)  # type: ignore[arg-type]
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # 1 kB a member, of which there may be a million
        if member.isreg() and not member.issparse():
            yield _readable(member.name), stream.content(member.size)
    if any(stream.last_read) or not stream.last_read:  # TarFile takes a broken header, and the file's end, for the archive's
        raise tarfile.ReadError("the archive ends too early, or is broken")
    for _ in blocks:  # to its end, where a compressed file has its checksum
        pass


class _Forward:
    """Blocks of bytes as the file that TarFile needs: it never goes back.

    Attributes:
      last_read: the bytes that were read last.
    """

    def __init__(self, blocks: Iterator[bytes]):
        self.last_read = b""
        self._blocks = blocks
        self._rest = memoryview(b"")
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        while self._position < position:
            if not (part := self._some(position - self._position)):
                raise EOFError("the archive ends too early")
            self._position += len(part)
        if position < self._position:
            raise tarfile.ReadError("a member's header is broken")
        return position

    def read(self, size: int) -> bytes:
        if size > HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        parts = []
        while size and (part := self._some(size)):
            parts.append(part)
            self._position += len(part)
            size -= len(part)
        self.last_read = b"".join(parts)
        return self.last_read

    def content(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, unless the file's position has moved on before."""
        begin, end = self._position, self._position + size
        while begin < end and self._position == begin:
            part = bytes(self._some(min(end - begin, READ_BYTES)))
            if not part:
                raise EOFError("the archive ends too early")
            begin = self._position = begin + len(part)
            yield part

    def _some(self, size: int) -> memoryview:
        """The next bytes, at most `size`; empty at the file's end."""
        while not self._rest and (block := next(self._blocks, None)) is not None:
            self._rest = memoryview(block)
        part, self._rest = self._rest[:size], self._rest[size:]
        return part


def zip_members(file: BinaryIO, progress: list[int]) -> Iterator[Member]:
    """The files in a zip, in the order of its directory. progress[0] is kept at the end of the member read last.

    Raises:
      One of compression.BROKEN: the archive is broken, or ends too early; of a member: that member is.
    """
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield _readable(member.filename), _zip_content(archive, member)
            progress[0] = max(progress[0], member.header_offset + member.compress_size)


def _zip_content(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with archive.open(member) as content:
            while block := content.read(READ_BYTES):
                yield block
    except (RuntimeError, OSError) as error:  # it wants a password or has a compression unknown here; broken bzip2
        raise zipfile.BadZipFile(str(error)) from error


def _readable(name: str) -> str:
    """A member's name, of whatever bytes, for messages."""
    return name.encode(errors="surrogateescape").decode(errors="replace")
