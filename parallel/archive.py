"""The checksums in what ``torch.save`` writes, at which ``torch.load`` does not look."""

import io
import zipfile
import zlib

_FIXED = 30  # bytes of a record's header in front of its name; the lengths of name and padding are its last four


def check_records(content: bytes) -> None:
    """Compare every record of a saved object with its checksum, in place: ``ZipFile.testzip`` copies them in small steps.

    Raises:
        ValueError: a record is compressed, or its bytes are not those that were written; it is named.
        zipfile.BadZipFile: it is no archive at all.
    """
    view = memoryview(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for record in archive.infolist():
            name, padding = (
                int.from_bytes(view[record.header_offset + at : record.header_offset + at + 2], "little")
                for at in (_FIXED - 4, _FIXED - 2)
            )
            start = record.header_offset + _FIXED + name + padding
            whole = record.compress_type == zipfile.ZIP_STORED
            if not whole or zlib.crc32(view[start : start + record.file_size]) != record.CRC:
                raise ValueError(f"wrong checksum of {record.filename}")
