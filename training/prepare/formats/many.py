"""Several files of one format as one."""

import numpy as np


class ManyRows:
    """Several files of one format as one, in order: big sets are extracted in pieces."""

    def __init__(self, parts):
        self.parts = parts
        if len({part.name for part in parts}) > 1:
            raise ValueError(f"the inputs have different formats: {', '.join(part.name for part in parts)}")
        self.name, self.in_pixels = parts[0].name, parts[0].in_pixels
        makers = [part.made_by for part in parts]
        if any(made_by != makers[0] for made_by in makers):
            raise ValueError(f"the inputs were made by different detectors: {makers}")
        self.made_by = makers[0]
        self.lacks = tuple(dict.fromkeys(lack for part in parts for lack in part.lacks))
        self.problems = [problem for part in parts for problem in part.problems]
        self.starts = np.cumsum([0] + [len(part) for part in parts]).tolist()

    def __len__(self):
        return self.starts[-1]

    def find(self, key):
        """The row of a key, in the first file that has it, or None."""
        for part, start in zip(self.parts, self.starts):
            row = part.find(key)
            if row is not None:
                return start + row
        return None

    def _own(self, row):
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[number], row - self.starts[number]

    def key(self, row):
        part, row = self._own(row)
        return part.key(row)

    def place(self, row):
        """(path, line number) of a row."""
        part, row = self._own(row)
        return part.place(row)

    def size(self, row):
        """As the file's own."""
        part, row = self._own(row)
        return part.size(row)

    def read(self, row, size):
        """As the file's own."""
        part, row = self._own(row)
        return part.read(row, size)
