"""Region features that other programs stored: scene-graph-benchmark, Oscar/VinVL, LXMERT, and stores written here.

Each reader gives the `Detections` of one row. What a row lacks makes it a `BadRow`; what a whole format lacks is
refused with the reason, or listed in `lacks`; nothing is made up. Nothing is unpickled.
"""

from pathlib import Path

from training.prepare.formats.lxmert import LxmertRows
from training.prepare.formats.many import ManyRows
from training.prepare.formats.oscar import OscarRows, _labels_of
from training.prepare.formats.scene_graph import SceneGraphRows
from training.prepare.formats.store import StoreRows
from training.prepare.formats.tsv_index import BadRow, TsvIndex
from training.prepare.formats.tsv_rows import _json

__all__ = ["BadRow", "ManyRows", "open_format"]

_UNREADABLE = {
    ".pth": "torch.save of pickled objects",
    ".pt": "torch.save of pickled objects",
    ".pkl": "a pickle",
    ".pickle": "a pickle",
    ".npz": "the arrays of bottom-up-attention.pytorch, whose names and scores are a pickled dictionary",
    ".npy": "the pairs of MMF, whose boxes and names are a pickled dictionary",
}


def open_format(
    path, key_pattern=None, predictions=None, hw=None, objects=None, attributes=None, attribute_threshold=0.1
):
    """The reader for `path`, told by its content.

    Raises `ValueError` for files that need unpickling, for formats that lack the scores or names that the best regions
    are chosen and named by, and where a companion file is missing; `FileNotFoundError`.
    """
    path = Path(path)
    if path.suffix in _UNREADABLE:
        raise ValueError(
            f"{path} is not read: {path.suffix} files are {_UNREADABLE[path.suffix]}, "
            f"and unpickling runs whatever code "
            "the file holds. Write it as TSV (LXMERT's columns, docs/prepare.md) with the program that made it"
        )
    if path.is_dir():
        return StoreRows(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    index = TsvIndex(path, key_pattern)
    if not len(index):
        raise ValueError(f"{path} has no row that begins with a key and a tab")
    columns = index.columns(0)
    if len(columns) == 10:
        return LxmertRows(index, objects, attributes, attribute_threshold)
    if len(columns) == 6:
        raise ValueError(
            f"{path} has the six columns of bottom-up-attention: boxes and features, "
            f"but no scores and no class names, so "
            "neither the most confident regions nor the tags can be had from it. Extract again with LXMERT's columns"
        )
    record = _json(columns[-1]) if len(columns) == 2 else None
    if isinstance(record, dict) and "objects" in record:
        return SceneGraphRows(index, hw)
    if len(columns) >= 3 or (isinstance(record, dict) and "features" in record):
        return OscarRows(index, TsvIndex(_labels_of(path, predictions), key_pattern))
    raise ValueError(
        f"{path}: its first row has {len(columns)} columns and is none of: "
        f"scene-graph-benchmark predictions.tsv (key, JSON with "
        "objects), Oscar features.tsv (key, number, base64), Oscar caption features "
        "(key, JSON with features), LXMERT (10 columns)"
    )
