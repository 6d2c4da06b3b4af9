"""What is in parquet files (data/identity.py says why): the columns that a run reads beside the pictures, as values; of
the picture columns raw bytes, nothing decoded."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from inpo_fast.data.identity import add, checksum, new_digest
from inpo_fast.data.places import File

WHOLE = 2**20  # bytes of a picture column in a row group that are read whole
SAMPLES, SAMPLE = 16, 4096  # of a larger one: how many places, bytes of each
PICTURES = ("jpg_0", "jpg_1")
ROWS = ("caption", "label_0", "label_1", "weight")
READERS = 8


def identity(
    files: Sequence[File],
    opened: Callable[[File], AbstractContextManager[pq.ParquetFile]],
    read: Callable[[pq.ParquetFile, File, int, list[str]], pa.Table],
) -> dict[str, str]:
    """opened, read: as the source opens a file and reads columns of a row group, with its errors."""
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda file: _of_file(file, opened, read), files))
    rows, pictures = new_digest(), new_digest()
    for own_rows, own_pictures in found:
        add(rows, own_rows)
        add(pictures, own_pictures)
    return {"rows": rows.hexdigest(), "pictures": pictures.hexdigest()}


def _of_file(file: File, opened, read) -> tuple[bytes, bytes]:
    rows, pictures = new_digest(), new_digest()
    if file.fs is not None:
        add(pictures, checksum(file).encode())
    with opened(file) as parquet:
        meta = parquet.metadata
        for number in range(meta.num_row_groups):
            table = read(parquet, file, number, [name for name in ROWS if name in parquet.schema_arrow.names])
            add(rows, b"group %d" % len(table), *(_of_values(table[name]) for name in table.column_names))
        spans = [each for number in range(meta.num_row_groups) for each in _picture_spans(meta, number)]
    for sizes, places in spans:
        content = file.read(*places) if file.fs is None else []
        add(pictures, sizes, *(hashlib.blake2b(part, digest_size=16).digest() for part in content))
    return rows.digest(), pictures.digest()


def _of_values(column: pa.ChunkedArray) -> bytes:
    """Values and nulls of a column of text or numbers, however it was written."""
    digest = new_digest()
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        add(digest, column.to_numpy().astype(np.float64).tobytes())
        return digest.digest()
    lengths = pc.binary_length(column.cast(pa.large_binary())).fill_null(-1)
    add(digest, lengths.to_numpy().astype(np.int64).tobytes())
    for chunk in column.cast(pa.large_binary()).chunks:
        ends = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        if len(chunk) and (content := chunk.buffers()[2]) is not None:
            digest.update(memoryview(content)[int(ends[0]) : int(ends[-1])])
    return digest.digest()


def _picture_spans(meta: pq.FileMetaData, number: int) -> Iterator[tuple[bytes, list[tuple[int, int]]]]:
    """Of each picture column of a row group its sizes, and what is read of it: first byte and length of each place."""
    group = meta.row_group(number)
    for i in range(meta.num_columns):
        # asked of the picture columns only, as when the file was opened: pyarrow 26 ends the whole process where the
        # statistics of a damaged file do not fit
        if meta.schema.column(i).path not in PICTURES:
            continue
        column = group.column(i)
        start, dictionary, size = column.data_page_offset, column.dictionary_page_offset, column.total_compressed_size
        if dictionary is not None and 0 < dictionary < start:
            start = dictionary
        sizes = f"{column.path_in_schema} {size} {column.total_uncompressed_size}".encode()
        if size <= WHOLE:
            yield sizes, [(start, size)]
        else:  # the first at its beginning, the last at its end
            yield sizes, [(start + k * (size - SAMPLE) // (SAMPLES - 1), SAMPLE) for k in range(SAMPLES)]
