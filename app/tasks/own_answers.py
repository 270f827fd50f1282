"""What models of one's own may answer: JSON types, NumPy's, and files."""
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Media:
    """An answer that is a file. media_type: its Content-Type, such as audio/wav."""
    data: bytes
    media_type: str


def plain(value, within="the answer"):
    """JSON types, from JSON types and NumPy's. Raises TypeError, ValueError."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{within} has {value}, which JSON lacks")
        return value
    if isinstance(value, dict):
        return {str(key): plain(one, f"{within}[{str(key)!r}]") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, f"{within}[{i}]") for i, one in enumerate(value)]
    raise TypeError(f"{within} has a {type(value).__name__}, which JSON lacks; encode must return JSON types or Media")
