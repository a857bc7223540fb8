"""What `data.path` names, and the rows that stand there.

Only data is read, never code: datasets from the Hub are taken if they are plain files of rows.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from stemtune.config import COMPRESSED, Source, is_hub_id
from stemtune.data.read import check_row, decode_rows, excerpt, parse_line, read_lines
from stemtune.data.records import Place
from stemtune.data.script import is_break
from stemtune.data.zstd import ZstdReader
from stemtune.errors import DataError, ModelError
from stemtune.network import first_line, retried

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "script",
}
BATCH = 1000  # rows of Parquet or Arrow that are in memory at once

Raw = bytes | dict[str, Any] | DataError
"""A row as it was read: a line that is still to be parsed, an object, or what is wrong with it."""


@dataclass(frozen=True)
class File:
    """One file of a source, or a dataset of the Hub."""

    path: Path
    kind: str
    source: Source

    def rows(self) -> Iterator[tuple[Place, Raw]]:
        """Its rows, in order, as a stream.

        Raises:
            DataError: the file can't be read, or holds no row.
        """
        empty = True
        for placed in _READERS[self.kind](self):
            empty = False
            yield placed
        if empty:
            hint = "a JSONL file has one JSON object a line"
            raise DataError("the file holds no rows", where=str(self.path), hint=hint)

    def digest(self) -> str:
        """Of what its rows depend on: changes if they may."""
        digest = hashlib.sha256(repr(self.source).encode())
        if self.kind == "hub":
            digest.update(_load_hub(self.source)._fingerprint.encode())
        else:
            with _readable(self.path), self.path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """By what others recognise it, without where it lies on this machine: its name and the
        SHA-256 of its bytes, or what it is on the Hub."""
        if self.kind == "hub":
            given = self.source.model_dump(include={"name", "split", "revision"}, exclude_none=True)
            return {"dataset": self.source.path, **given}
        with _readable(self.path), self.path.open("rb") as file:
            return {
                "file": self.path.name,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }


def parse(place: Place, raw: Raw) -> dict[str, Any]:
    """The row.

    Raises:
        DataError: it can't be right.
    """
    if isinstance(raw, DataError):
        raise raw
    return parse_line(place, raw) if isinstance(raw, bytes) else raw


def find_files(sources: list[Source], field: str) -> list[File]:
    """The files that sources name: a file, a glob, a folder with all below it, or a Hub id.

    Args:
        field: the setting that names them, for complaints.

    Raises:
        DataError: there is nothing, or nothing that can be read.
    """
    files: list[File] = []
    for source in sources:
        path = Path(source.path)
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
            found = [File(p, kind, source) for p in below if (kind := _kind_of(p))]
            if not found:
                hint = f"it may hold {', '.join(KINDS)} files, also as {' or '.join(COMPRESSED)}"
                raise DataError("no data files in this folder", where=str(path), hint=hint)
            files += found
        elif path.exists() or not (_is_glob(source.path) or is_hub_id(source.path)):
            files.append(File(path, _kind_of(path) or "jsonl", source))
        elif _is_glob(source.path):
            names = sorted(glob(source.path, recursive=True))  # noqa: PTH207 (absolute patterns)
            matched = [name for name in names if Path(name).is_file()]
            if not matched:
                hint = f"{field} is relative to the run file"
                raise DataError("no file matches", where=source.path, hint=hint)
            files += [File(Path(p), _kind_of(Path(p)) or "jsonl", source) for p in matched]
        else:
            files.append(File(path / source.split, "hub", source))
    return files


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[")


def _hidden(path: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def _kind_of(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return KINDS.get(suffixes[-1], "") if suffixes else ""


# -- opening ----------------------------------------------------------------------------------


@contextmanager
def _readable(path: Path) -> Generator[None]:
    """Turns what an operating system or a decompressor says into an error for a person."""
    try:
        yield
    except FileNotFoundError:
        hint = "data.path is relative to the run file"
        raise DataError("there is no such file", where=str(path), hint=hint) from None
    except (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError) as error:
        hint = "check the path, its permissions, and that it was copied whole"
        raise DataError(f"can't be read: {error}", where=str(path), hint=hint) from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(cast(Any, ZstdReader(path)), 1 << 20)
    return path.open("rb")


def _open_whole(path: Path) -> IO[bytes]:
    """For readers that go back and forth: zstd can't, so such a file is unpacked into memory."""
    if path.suffix.lower() != ".zst":
        return _open(path)
    with _open(path) as stream:
        return io.BytesIO(stream.read())


# -- readers, one a kind ----------------------------------------------------------------------


def _read_jsonl(file: File) -> Iterator[tuple[Place, Raw]]:
    with _readable(file.path), _open(file.path) as stream:
        yield from read_lines(file.path, stream)


def _read_json(file: File) -> Iterator[tuple[Place, Raw]]:
    """A list of objects. Many a `.json` file is JSONL, and is read as such."""
    with _readable(file.path), _open_whole(file.path) as stream:
        head = stream.read(1 << 16)
        while not head.lstrip(b"\xef\xbb\xbf \t\r\n") and (more := stream.read(1 << 16)):
            head += more
        start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        stream.seek(0)
        if start == b"{" and _is_object(stream):
            stream.seek(0)
            yield from read_lines(file.path, stream)
            return
        stream.seek(0)
        # What does not begin as a list is refused by its first bytes, however long it is; they may
        # end inside a character.
        whole = codecs.utf_8_decode(head, "replace", False)[1]
        yield from decode_rows(file.path, stream.read() if start == b"[" else head[:whole])


def _is_object(stream: IO[bytes]) -> bool:
    """Whether the first line is a whole object."""
    lines = (line for _, line in read_lines(Path(), stream))
    try:
        return isinstance(json.loads(next(lines).lstrip(b"\xef\xbb\xbf")), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(file: File) -> Iterator[tuple[Place, Raw]]:
    delimiter = "\t" if file.kind == "tsv" else ","
    csv.field_size_limit(1 << 24)
    with _readable(file.path), _open(file.path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            place = Place(file.path, line)
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                hint = "a quote inside a field is written twice, and the field in quotes"
                yield place, DataError(f"not valid CSV: {error}", where=str(place), hint=hint)
                continue
            if not values:
                continue
            if header is None:
                header = values
                twice = [name for name in header if header.count(name) > 1]
                if twice:
                    what = f"the header names the column {excerpt(twice[0])!r} twice"
                    raise DataError(what, where=str(place), hint="rename or remove one of them")
                continue
            yield place, _csv_row(place, header, values)


def _csv_row(place: Place, header: list[str], values: list[str]) -> Raw:
    if len(values) != len(header):
        what = f"{len(values)} fields, but the header has {len(header)}"
        hint = "put fields that hold the separator or a line break into quotes"
        return DataError(what, where=str(place), hint=hint)
    return check_row(dict(zip(header, values, strict=True)), place)


def _read_columns(file: File) -> Iterator[tuple[Place, Raw]]:
    import pyarrow as pa
    import pyarrow.parquet

    with _readable(file.path), _open_whole(file.path) as stream:
        if file.kind == "parquet":
            batches: Any = pyarrow.parquet.ParquetFile(stream).iter_batches(BATCH)
        else:
            batches = _arrow_batches(pa, stream)
        number = 0
        for batch in batches:
            for row in cast(list[dict[str, Any]], batch.to_pylist()):
                number += 1
                place = Place(file.path, number)
                yield place, check_row(row, place)


def _arrow_batches(pa: Any, stream: IO[bytes]) -> Iterator[Any]:
    """Arrow files come with random access, or as a stream."""
    try:
        reader = pa.ipc.open_file(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        yield from pa.ipc.open_stream(stream)
        return
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


def _read_script(file: File) -> Iterator[tuple[Place, Raw]]:
    """A play: one row a scene."""
    with _readable(file.path), _open(file.path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape")
        scene: list[str] = []
        opened = 1
        for number, line in enumerate(text, 1):
            if not is_break(line):
                scene.append(line)
                continue
            yield from _scene(file.path, opened, scene)
            scene, opened = [], number + 1
        yield from _scene(file.path, opened, scene)


def _scene(path: Path, line: int, lines: list[str]) -> Iterator[tuple[Place, Raw]]:
    text = "".join(lines)
    if text.strip():
        place = Place(path, line)
        yield place, check_row({"scene": text}, place)


def _read_hub(file: File) -> Iterator[tuple[Place, Raw]]:
    for number, row in enumerate(_load_hub(file.source), 1):
        place = Place(file.path, number)
        yield place, check_row(cast(dict[str, Any], row), place)


def _load_hub(source: Source) -> Any:
    """A split of a dataset of the Hub, memory-mapped.

    Raises:
        ModelError: no such dataset, split or revision; no access; no network; or it wants code.
    """
    from datasets import load_dataset_builder

    def call() -> Any:
        builder = load_dataset_builder(source.path, source.name, revision=source.revision)
        module = type(builder).__module__
        if not re.search(r"packaged_modules\.(json|csv|parquet|arrow)\b", module):
            raise ValueError(f"it is not plain rows, but needs the builder {module}")
        builder.download_and_prepare()
        return builder.as_dataset(split=source.split)

    try:
        return retried(call)
    except Exception as error:  # datasets, the hub, pyarrow: each has its own kinds
        what = f"can't load {source.split!r} of the dataset {source.path!r}: {first_line(error)}"
        hint = "is the name right (or the path, if you mean a file), and is the network there?"
        raise ModelError(what, where="data.path", hint=hint) from error


_READERS = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": _read_columns,
    "arrow": _read_columns,
    "script": _read_script,
    "hub": _read_hub,
}
