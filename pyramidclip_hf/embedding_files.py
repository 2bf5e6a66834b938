# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Files of embeddings: written part by part, so that the job may be killed at any moment, and read back.

A file has one row a picture or text: `path` or `text`, and `embedding`, float32 of unit length; and as metadata a JSON
mapping with `model`, the name that the model was loaded by, and `model_sha256`, which identifies its weights. In
Parquet the metadata is the schema's key `pyramidclip`; in npz it is the array `metadata`. Nothing in them is pickled.

While a job runs, `OUTPUT.parts/` holds its settings, the list of what is embedded, and the finished parts. A part is
written aside and renamed, so it is there or not; the file itself is put together from the parts at the end, in the
order of the list, and is the same byte for byte whether the job was killed in between or not.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from .files import json_text, write_atomically, written_aside
from .parquet_pages import ALWAYS_BYTES, LARGEST_RATIO, check_rows, check_whole, group_bytes

SUFFIXES = (".parquet", ".npz")
KINDS = ("path", "text")
_METADATA_KEY = "pyramidclip"
# Rows of a Parquet row group: where one row is wanted, its group is read.
_ROW_GROUP = 1 << 10
# Rows that are in memory where a file is read block by block.
_BLOCK = 1 << 13
# How far from 1 the length of a row may be.
_LENGTH_TOLERANCE = 1e-3


class StoredEmbeddings(NamedTuple):
    """`names`: N paths or texts; `embeddings`: (N, D) float32, unit rows; `metadata`: see the module."""

    names: list[str]
    embeddings: np.ndarray
    metadata: dict[str, Any]

    @property
    def kind(self) -> str:
        """What `names` are: "path" or "text"."""
        return self.metadata["kind"]


def check_output(path: str | os.PathLike) -> Path:
    """The path of an embeddings file to be written.

    Raises:
        ValueError: another suffix than .parquet and .npz, or no such folder.
        ImportError: Parquet without pyarrow.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--output {path}: expected a name ending in {' or '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}.")
    if path.suffix == ".parquet":
        _pyarrow()
    return path


class EmbeddingJob:
    """What is to be embedded into one file, and which parts of it are done.

    Args:
        output: the file, see `check_output`.
        model_name: what the model was loaded by; on continuing, the name that the job began with stays.
        settings: what decides the embeddings, as JSON types, with `model_sha256` and `kind` ("path" or "text"); a job
            begun with others is not continued.
        items: paths or texts, in the order of the file's rows. On continuing, the list that the job began with stays,
            and that of a finished file.
        part_size: items of a part.
        overwrite: take the place of what is there, a job of other settings or a file; the file stays until then. A job
            that was itself begun so, with the same settings, is continued.

    Raises:
        ValueError: a job begun, or a file made, with other settings.
    """

    def __init__(
        self,
        output: Path,
        model_name: str,
        settings: Mapping[str, Any],
        items: Sequence[str],
        part_size: int = 1024,
        overwrite: bool = False,
    ):
        self.output, self.folder = output, output.with_name(f"{output.name}.parts")
        asked: dict[str, Any] = json.loads(json_text({**settings, "part_size": part_size}))
        began = self._began()
        if overwrite and not (began and began["overwrites"] and began["settings"] == asked):
            began = None
        self.continues, self.complete = began is not None, False
        if began is None and output.exists() and not overwrite:
            self.complete = True
            self._remove_folder()  # of a process that was killed while it did so
            metadata = read_metadata(output)
            skipped = [one for one, _ in metadata["skipped"]]
            began = {**metadata, "items": _read_names(output, metadata["kind"]) + skipped}
        if began is None:
            began = {"model": model_name, "settings": asked, "items": list(items), "overwrites": overwrite}
            self._begin(began)
        elif began["settings"] != asked:
            raise ValueError(self._refusal(began, asked, model_name))
        self.model_name: str = began["model"]
        self.settings: dict[str, Any] = began["settings"]
        self.items: list[str] = began["items"]
        self.part_size = part_size

    def _began(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / "job.json").read_text(encoding="utf8"))
        except FileNotFoundError:
            # Killed before it had begun, or while its folder was being removed.
            return None

    def _begin(self, job: dict[str, Any]) -> None:
        self._remove_folder()
        self.folder.mkdir()
        write_atomically(self.folder / "job.json", json_text(job).encode())

    def _refusal(self, began: dict[str, Any], settings: dict[str, Any], model_name: str) -> str:
        before, changed = began["settings"], []
        for name in sorted(before.keys() | settings.keys()):
            then, now = before.get(name), settings.get(name)
            if then != now and name == "model_sha256":
                changed.append(f"model then {began['model']} (sha256 {then!s:.12}), now {model_name} ({now!s:.12})")
            elif then != now:
                changed.append(f"{name} then {_short(then)}, now {_short(now)}")
        what = "was made" if self.complete else "is being made by a job that began"
        return (
            f"{self.output} {what} with other settings: {'; '.join(changed)}. Use the same settings to continue, "
            "another --output, or --overwrite to begin again."
        )

    def _remove_folder(self) -> None:
        # Settings first: without them the rest counts as nothing.
        (self.folder / "job.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def remembered(self, name: str, choose: Callable[[], str]) -> str:
        """What `choose()` gave in the run that began this job."""
        path = self.folder / f"{name}.txt"
        if not path.exists():
            write_atomically(path, choose().encode())
        return path.read_text(encoding="utf8")

    def _part_file(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.npz"

    @property
    def parts(self) -> range:
        """The numbers of all parts."""
        return range(-(-len(self.items) // self.part_size))

    def missing(self) -> list[int]:
        """The numbers of the parts that are not done."""
        return [] if self.complete else [number for number in self.parts if self.is_missing(number)]

    def is_missing(self, number: int) -> bool:
        """Whether a part is not done."""
        return not (self.complete or self._part_file(number).exists())

    def items_of(self, number: int) -> list[str]:
        """The items of a part."""
        return self.items[number * self.part_size : (number + 1) * self.part_size]

    def save(
        self, number: int, names: Sequence[str], embeddings: np.ndarray, skipped: Sequence[tuple[str, str]]
    ) -> None:
        """Marks a part as done.

        Args:
            number: of the part.
            names: of its rows.
            embeddings: (n, D) float32.
            skipped: (item, reason) of those without a row.
        """
        if len(names) != len(embeddings) or len(names) + len(skipped) != len(self.items_of(number)):
            raise RuntimeError(f"part {number}: {len(names)} names, {len(embeddings)} rows, {len(skipped)} skipped")
        listing = json_text({"names": list(names), "skipped": [list(one) for one in skipped]})
        with written_aside(self._part_file(number)) as aside, open(aside, "wb") as file:
            np.savez(file, embedding=np.asarray(embeddings, np.float32), listing=np.array(listing))

    def _load(self, number: int, array: str) -> np.ndarray:
        path = self._part_file(number)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return arrays[array]
        except Exception as error:  # of damaged files, zipfile, zlib and NumPy raise almost anything
            raise ValueError(f"{path} is damaged ({error}); delete it, and the same command makes it again.") from error

    def names_and_skipped(self, number: int) -> tuple[list[str], list[tuple[str, str]]]:
        """What `save` took for a finished part.

        Raises:
            ValueError: a damaged part; it is to be deleted.
        """
        listing = json.loads(str(self._load(number, "listing")))
        return listing["names"], [tuple(one) for one in listing["skipped"]]

    def skipped(self) -> list[tuple[str, str]]:
        """(item, reason) of all that has no row, as far as the job is done."""
        if self.complete:
            return [tuple(one) for one in read_metadata(self.output)["skipped"]]
        missing = set(self.missing())
        done = [number for number in self.parts if number not in missing]
        return [one for number in done for one in self.names_and_skipped(number)[1]]

    def finish(self) -> tuple[int, list[tuple[str, str]]]:
        """Writes the file, removes the parts, and returns the number of rows and all that was skipped.

        Raises:
            ValueError: not one item has an embedding.
        """
        if self.complete:
            return read_metadata(self.output)["rows"], self.skipped()
        names, skipped = [], []
        for number in self.parts:
            of_part = self.names_and_skipped(number)
            names += of_part[0]
            skipped += of_part[1]
        if not names:
            raise ValueError(f"None of {len(self.items)} could be embedded, so {self.output} was not written.")
        metadata = {"model": self.model_name, "settings": self.settings, "rows": len(names), "skipped": skipped}
        metadata |= {name: self.settings[name] for name in ("kind", "model_sha256")}
        write = _write_parquet if self.output.suffix == ".parquet" else _write_npz
        blocks = (rows for rows in (self._load(number, "embedding") for number in self.parts) if len(rows))
        with written_aside(self.output, sole_writer=True) as aside, open(aside, "wb") as file:
            write(file, names, blocks, metadata)
        self._remove_folder()
        return len(names), skipped


def read_embeddings(path: str | os.PathLike) -> StoredEmbeddings:
    """Reads a whole file of embeddings; it has to fit into memory. Nothing is unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file that `pyramidclip embed` wrote, or rows that are not finite and of unit length.
        ImportError: Parquet without pyarrow.
    """
    path = Path(path)
    metadata = read_metadata(path)
    kind = metadata["kind"]
    try:
        if path.suffix == ".parquet":
            with _opened_parquet(path, [kind, "embedding"]) as file:
                table = file.read([kind, "embedding"])
            names = table.column(kind).to_pylist()
            rows = table.column("embedding").combine_chunks()
            embeddings = rows.flatten().to_numpy(zero_copy_only=False, writable=True).reshape(len(names), -1)
        else:
            with _opened_npz(path) as arrays:
                names, embeddings = arrays[kind].tolist(), arrays["embedding"]
    except ImportError:
        raise
    except Exception as error:  # of damaged files, zipfile, zlib and NumPy raise almost anything
        raise _not_ours(path, error) from error
    if embeddings.ndim != 2 or len(embeddings) != len(names) or embeddings.dtype != np.float32:
        raise ValueError(
            f"{path}: expected embeddings (N, D) float32 for N rows, got {embeddings.shape} {embeddings.dtype} for "
            f"{len(names)}."
        )
    _check_lengths(path, embeddings, 0)
    return StoredEmbeddings(names, embeddings, metadata)


def _check_lengths(path: Path, embeddings: np.ndarray, start: int) -> None:
    """ValueError where rows, of which the first is row `start` of the file, are not unit vectors."""
    lengths = np.linalg.norm(embeddings, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _LENGTH_TOLERANCE))
    if len(wrong):
        raise ValueError(
            f"{path}: {len(wrong)} rows are not of unit length, the first is row {start + wrong[0]} with length "
            f"{lengths[wrong[0]]:.4g}. Make the file again."
        )


def embedding_blocks(path: str | os.PathLike) -> Iterator[np.ndarray]:
    """The embeddings of a file in order, (n, D) float32 at a time; see `read_embeddings` for the errors."""
    path, start = Path(path), 0
    rows = read_metadata(path)["rows"]
    blocks = _parquet_blocks(path) if path.suffix == ".parquet" else _npz_blocks(path)
    try:
        for block in blocks:
            _check_lengths(path, block, start)
            start += len(block)
            yield block
        if start != rows:
            raise ValueError(f"{path}: expected {rows} rows, got {start}")
    except (ImportError, ValueError):
        raise
    except Exception as error:  # as in `read_embeddings`
        raise _not_ours(path, error) from error


def rows_at(path: str | os.PathLike, places: np.ndarray, column: str) -> np.ndarray:
    """What a column ("embedding" or the file's kind) has at `places` (n,), ascending: (n, D) or (n,)."""
    path = Path(path)
    if path.suffix == ".parquet":
        with _opened_parquet(path) as file, open(path, "rb") as pages:
            ends = np.cumsum(check_rows(pages, file))
            found = []
            for group in np.unique(np.searchsorted(ends, places, side="right")):
                first = ends[group - 1] if group else 0
                own = places[(places >= first) & (places < ends[group])] - first
                if group_bytes(pages, file, group, [column]) > max(ALWAYS_BYTES, LARGEST_RATIO * path.stat().st_size):
                    raise ValueError(f"{path}: {column} of row group {group} unpacks to more than the file can hold")
                table = file.read_row_group(group, columns=[column], use_threads=False)
                values = table.column(0).combine_chunks()
                taken = values.take(own)
                found.append(_vectors(taken) if column == "embedding" else np.array(taken.to_pylist(), dtype=object))
            return np.concatenate(found)
    if column == "embedding":
        return np.concatenate(list(_taken(embedding_blocks(path), places)))
    with _opened_npz(path) as arrays:
        return arrays[column][places]


def _taken(blocks: Iterator[np.ndarray], places: np.ndarray) -> Iterator[np.ndarray]:
    start = 0
    for block in blocks:
        yield block[places[(places >= start) & (places < start + len(block))] - start]
        start += len(block)


def _vectors(column: Any) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=False, writable=True).reshape(len(column), -1)


def _parquet_blocks(path: Path) -> Iterator[np.ndarray]:
    with _opened_parquet(path, ["embedding"]) as file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        for groups in _neighbours(rows):
            # A reader over all groups keeps what it has read of each.
            for batch in file.iter_batches(batch_size=_BLOCK, row_groups=groups, columns=["embedding"]):
                yield _vectors(batch.column(0))


def _neighbours(rows: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of the row groups that make a block together."""
    groups: list[int] = []
    held = 0
    for group, number in enumerate(rows):
        groups.append(group)
        held += number
        if held >= _BLOCK or group + 1 == len(rows):
            yield groups
            groups, held = [], 0


def _npz_blocks(path: Path) -> Iterator[np.ndarray]:
    _check_archive(path)
    with zipfile.ZipFile(path) as archive, archive.open("embedding.npy") as member:
        np.lib.format.read_magic(member)
        (rows, width), fortran, dtype = np.lib.format.read_array_header_1_0(member)
        if fortran or dtype != np.float32:
            raise ValueError(f"{path}: expected embeddings (N, D) float32, row by row, got {dtype}.")
        for start in range(0, rows, _BLOCK):
            count = min(_BLOCK, rows - start)
            block = np.frombuffer(member.read(count * width * 4), np.float32)
            yield block.reshape(count, width).copy()


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a file of embeddings; see `read_embeddings` for the errors."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file of embeddings, whose name ends in {' or '.join(SUFFIXES)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; `pyramidclip embed` writes it.")
    try:
        if path.suffix == ".parquet":
            _, parquet = _pyarrow()
            text = (parquet.read_schema(path).metadata or {})[_METADATA_KEY.encode()]
        else:
            with _opened_npz(path) as arrays:
                text = str(arrays["metadata"])
        metadata = json.loads(text)
        known = {"model": str, "model_sha256": str, "kind": str, "settings": dict, "rows": int, "skipped": list}
        wrong = [name for name, kind in known.items() if not isinstance(metadata[name], kind)]
        if wrong or metadata["kind"] not in KINDS:
            raise ValueError(f"metadata {wrong or metadata['kind']}")
        return metadata
    except ImportError:
        raise
    except Exception as error:  # as above
        raise _not_ours(path, error) from error


def _read_names(path: Path, kind: str) -> list[str]:
    """What the rows of a file of embeddings are of; the embeddings are not read."""
    try:
        if path.suffix == ".parquet":
            with _opened_parquet(path, [kind]) as file:
                return file.read([kind]).column(kind).to_pylist()
        with _opened_npz(path) as arrays:
            return arrays[kind].tolist()
    except ImportError:
        raise
    except Exception as error:  # of damaged files, zipfile, zlib and NumPy raise almost anything
        raise _not_ours(path, error) from error


@contextmanager
def _opened_parquet(path: Path, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """The `pyarrow.parquet.ParquetFile`; ValueError where `columns` (None: not looked at) unpack to too much."""
    _, parquet = _pyarrow()
    with parquet.ParquetFile(path) as file:
        with open(path, "rb") as pages:
            if columns is None:
                check_rows(pages, file)
            else:
                check_whole(pages, file, columns)
        yield file


@contextmanager
def _opened_npz(path: Path) -> Iterator[Any]:
    """What `numpy.load` gives; ValueError where it unpacks to too much."""
    _check_archive(path)
    with np.load(path, allow_pickle=False) as arrays:
        yield arrays


def _check_archive(path: Path) -> None:
    """ValueError where the members of a zip archive say that they unpack to too much; no more of them is read."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
    if total > max(ALWAYS_BYTES, LARGEST_RATIO * size):
        raise ValueError(f"{path} unpacks to {total} bytes, of a file of {size}: more than is read")


def _not_ours(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is no file of embeddings that `pyramidclip embed` wrote, or it is damaged "
        f"({type(error).__name__}: {error})."
    )


def _write_npz(file: BinaryIO, names: list[str], blocks: Iterator[np.ndarray], metadata: dict[str, Any]) -> None:
    """As `np.savez`, but with one block of rows in memory at a time, and without the time of day in it."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def member(name: str) -> IO[bytes]:
            return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)

        for name, value in ((metadata["kind"], names), ("metadata", json_text(metadata))):
            with member(name) as part:
                np.lib.format.write_array(part, np.array(value), allow_pickle=False)
        with member("embedding") as part:
            header = None
            for block in blocks:
                if header is None:
                    header = {"descr": "<f4", "fortran_order": False, "shape": (len(names), block.shape[1])}
                    np.lib.format.write_array_header_1_0(part, header)
                part.write(np.ascontiguousarray(block, "<f4").tobytes())


def _write_parquet(file: BinaryIO, names: list[str], blocks: Iterator[np.ndarray], metadata: dict[str, Any]) -> None:
    pyarrow, parquet = _pyarrow()
    writer: Any = None
    done = 0
    waiting: list[np.ndarray] = []

    def write_group() -> None:
        nonlocal writer, done, waiting
        rows = np.concatenate(waiting)
        vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), rows.shape[1])
        if writer is None:
            fields = [(metadata["kind"], pyarrow.string()), ("embedding", vectors.type)]
            schema = pyarrow.schema(fields, metadata={_METADATA_KEY: json_text(metadata)})
            # Numbers of unit vectors do not compress; packing and unpacking them takes half the time.
            compression = {metadata["kind"]: "snappy", "embedding.list.element": "none"}
            writer = parquet.ParquetWriter(file, schema, use_dictionary=False, compression=compression)
        columns = [pyarrow.array(names[done : done + len(rows)], pyarrow.string()), vectors]
        writer.write_table(pyarrow.Table.from_arrays(columns, schema=writer.schema), row_group_size=_ROW_GROUP)
        done, waiting = done + len(rows), []

    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= _ROW_GROUP:
            write_group()
    if waiting:
        write_group()
    if writer is not None:
        writer.close()


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('Parquet needs pyarrow: pip install "pyramidclip-hf[train]", or choose .npz') from error
    return pyarrow, pyarrow.parquet


def _short(value: Any) -> str:
    text = json_text(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
