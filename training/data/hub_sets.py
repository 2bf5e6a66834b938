"""Data sets that the `datasets` library loads: their files are looked at before it reads them.

It reads a row group of Parquet at a time, unpacks archives into its cache, and maps Arrow files as they are; none of it
has a limit. So each file passes here first.
"""

import bz2
import gzip
import lzma
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pyramidclip_hf.files import parse_json, read_regular
from pyramidclip_hf.parquet_pages import ALWAYS_BYTES, LARGEST_RATIO, check_whole

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_MOST_STATE_BYTES = 64 << 20
_CHUNK = 1 << 20
# The first bytes of what `datasets` unpacks, and what reads it here; None: nothing here does.
_PACKED: dict[bytes, Callable[[str], Any] | None] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": None,
    b"\x04\x22\x4d\x18": None,
    b"7z\xbc\xaf\x27\x1c": None,
    b"Rar!": None,
}


class RefusedFile(ValueError):
    """A file of a data set that would cost far more than its size, or that is not what its name says."""


def load_checked(
    name: str,
    subset: str | None = None,
    *,
    split: str | None,
    revision: str | None = None,
    data_files: str | None = None,
) -> "Dataset":
    """As `datasets.load_dataset`, which is not asked to read what unpacks to too much.

    Args:
        name: of the data set, a folder, or a kind of files.
        subset: the data set's configuration.
        split: of the data set.
        revision: of a data set of the Hub.
        data_files: of the kind `name`.

    Raises:
        RefusedFile: Parquet or an archive that unpacks to more than 256 MiB and 16 times its size.
        Exception: as `datasets.load_dataset`.
    """
    import datasets

    class Manager(datasets.DownloadManager):
        def download(self, url_or_urls: Any) -> Any:
            found = super().download(url_or_urls)
            for path in _flat(found):
                _check_parquet(path)
            return found

        def extract(self, path_or_paths: Any) -> Any:
            for path in _flat(path_or_paths):
                _check_archive(path)
            return super().extract(path_or_paths)

    builder = datasets.load_dataset_builder(name, subset, revision=revision, data_files=data_files)
    manager = Manager(
        dataset_name=builder.dataset_name,
        data_dir=builder.config.data_dir,
        # As `download_and_prepare` has it.
        download_config=datasets.DownloadConfig(
            cache_dir=getattr(builder, "_cache_downloaded_dir", None),
            use_etag=False,
            token=builder.token,
            storage_options=builder.storage_options,
        ),
        base_path=builder.base_path,
    )
    builder.download_and_prepare(dl_manager=manager)
    return builder.as_dataset(split=split)


def load_saved(folder: str) -> "Dataset | DatasetDict":
    """As `datasets.load_from_disk`, for a folder that somebody else may have written.

    Raises:
        RefusedFile: a file that leads out of the folder, is damaged, or holds what `save_to_disk` does not write.
        Exception: as `datasets.load_from_disk`.
    """
    import datasets

    for state in sorted([Path(folder) / "state.json", *Path(folder).glob("*/state.json")]):
        if state.is_file():
            for path in _arrow_files(state):
                _check_arrow(path)
    return datasets.load_from_disk(folder)


def _flat(paths: Any) -> Iterator[str]:
    if isinstance(paths, Mapping):
        paths = paths.values()
    if isinstance(paths, str):
        yield paths
    else:
        for inner in paths:
            yield from _flat(inner)


def _check_parquet(path: str) -> None:
    """Whatever it is called: `datasets` knows the kind from elsewhere."""
    from pyarrow.parquet import ParquetFile

    if not Path(path).is_file():
        return
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 4))
        if file.read(4) not in (b"PAR1", b"PARE"):
            return
        try:
            check_whole(file, ParquetFile(path))
        except Exception as error:  # of damaged files, pyarrow raises almost anything
            raise RefusedFile(f"{path} is no Parquet file that can be read: {error}") from error


def _check_archive(path: str) -> None:
    if not Path(path).is_file():
        return
    size = Path(path).stat().st_size
    limit = max(ALWAYS_BYTES, LARGEST_RATIO * size)
    with open(path, "rb") as file:
        first = file.read(8)
    packed = [read for magic, read in _PACKED.items() if first.startswith(magic)]
    try:
        if packed:
            total = limit + 1 if packed[0] is None else _length(packed[0](path), limit)
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # of a member, no more than it says is read
                total = sum(member.file_size for member in archive.infolist())
        else:
            return
    except Exception as error:  # of damaged archives, these libraries raise almost anything
        raise RefusedFile(f"{path} is an archive that cannot be read: {error}") from error
    if total > limit:
        raise RefusedFile(
            f"{path} is an archive of {size} bytes, and what it unpacks to is not known or more than {limit}: unpack "
            "it first if you trust it"
        )


def _length(stream: BinaryIO, limit: int) -> int:
    """Of what a stream unpacks to, as far as `limit` and a little more."""
    total = 0
    with stream:
        while total <= limit and (chunk := stream.read(_CHUNK)):
            total += len(chunk)
    return total


def _arrow_files(state: Path) -> Iterator[Path]:
    try:
        listed = parse_json(read_regular(state, _MOST_STATE_BYTES))["_data_files"]
        names = [str(entry["filename"]) for entry in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedFile(f"{state} is not what save_to_disk writes: {error}") from error
    for name in names:
        if Path(name).name != name:
            raise RefusedFile(f"{state}: {name!r} leads out of the folder")
        if not (state.parent / name).is_file():
            raise RefusedFile(f"{state} names {name}, which is no file there")
        yield state.parent / name


def _check_arrow(path: Path) -> None:
    """Arrow is mapped into memory and believed: a wrong offset in it reads what lies elsewhere, or ends the process."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            for message in pyarrow.ipc.MessageReader.open_stream(file):
                if message.type == "dictionary" or (message.type == "record batch" and _is_packed(message.metadata)):
                    raise ValueError(f"it has a packed part or a dictionary ({message.type})")
        with pyarrow.memory_map(str(path)) as file:
            reader = pyarrow.ipc.open_stream(file)
            for field in reader.schema:
                _check_kind(field.type)
            for batch in reader:
                batch.validate(full=True)
    except Exception as error:  # of damaged files, pyarrow raises almost anything
        raise RefusedFile(f"{path} is not what save_to_disk writes: {error}") from error


def _is_packed(metadata: Any) -> bool:
    """Whether the metadata of a record batch (a FlatBuffer: Message.header, RecordBatch.compression) name a codec."""
    data = bytes(metadata)

    def field(table: int, number: int) -> int:
        fields = table - int.from_bytes(data[table : table + 4], "little", signed=True)
        if 4 + 2 * number >= int.from_bytes(data[fields : fields + 2], "little"):
            return 0
        place = fields + 4 + 2 * number
        return int.from_bytes(data[place : place + 2], "little")

    message = int.from_bytes(data[:4], "little")
    place = message + field(message, 2)
    batch = place + int.from_bytes(data[place : place + 4], "little")
    return field(batch, 3) != 0


def _check_kind(kind: Any) -> None:
    """ValueError where values of a column may stand for many: dictionaries, runs and views."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _check_kind(kind.storage_type)
    if pyarrow.types.is_dictionary(kind) or pyarrow.types.is_run_end_encoded(kind) or "view" in str(kind):
        raise ValueError(f"a column of {kind}")
    for number in range(kind.num_fields):
        _check_kind(kind.field(number).type)
    return None
