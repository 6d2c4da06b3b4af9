"""What is in parquet files, from parts of them: raw bytes of columns, nothing decoded (data/identity.py says why)."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq

from inpo_fast.data.identity import add, checksum, new_digest
from inpo_fast.data.places import File

WHOLE = 2**20  # bytes of a column in a row group that are read whole
SAMPLES, SAMPLE = 16, 4096  # of a larger one: how many places, bytes of each
PICTURES = ("jpg_0", "jpg_1")
ALWAYS_WHOLE = ("caption", "label_0", "label_1", "weight")
READERS = 8

Span = tuple[int, int]  # first byte, length


def identity(files: Sequence[File], opened) -> dict[str, str]:
    """opened: gives for a File the context of its ParquetFile."""
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda file: _of_file(file, opened), files))
    rows, pictures = new_digest(), new_digest()
    for own_rows, own_pictures in found:
        add(rows, own_rows)
        add(pictures, own_pictures)
    return {"rows": rows.hexdigest(), "pictures": pictures.hexdigest()}


def _of_file(file: File, opened) -> tuple[bytes, bytes]:
    with opened(file) as parquet:
        meta = parquet.metadata
    rows, pictures = new_digest(), new_digest()
    if file.fs is not None:
        add(pictures, checksum(file).encode())
    for number in range(meta.num_row_groups):
        group = meta.row_group(number)
        rows.update(b"group %d" % group.num_rows)
        spans: list[tuple[object, bytes, list[Span]]] = []
        for column in (group.column(i) for i in range(group.num_columns)):
            name = column.path_in_schema
            of_picture = name in PICTURES
            kind = f"{name} {column.total_compressed_size} {column.total_uncompressed_size}".encode()
            remote = file.fs is not None and name not in ALWAYS_WHOLE
            spans.append((pictures if of_picture else rows, kind, [] if remote else list(_spans(column))))
        read = iter(file.read(*(span for _, _, some in spans for span in some)))
        for digest, kind, some in spans:
            add(digest, kind, *(hashlib.blake2b(next(read), digest_size=16).digest() for _ in some))
    return rows.digest(), pictures.digest()


def _spans(column: pq.ColumnChunkMetaData) -> Iterator[Span]:
    start, dictionary, size = column.data_page_offset, column.dictionary_page_offset, column.total_compressed_size
    if dictionary is not None and 0 < dictionary < start:
        start = dictionary
    if column.path_in_schema in ALWAYS_WHOLE or size <= WHOLE:
        yield start, size
        return
    for i in range(SAMPLES):  # the first at its beginning, the last at its end
        yield start + i * (size - SAMPLE) // (SAMPLES - 1), SAMPLE
