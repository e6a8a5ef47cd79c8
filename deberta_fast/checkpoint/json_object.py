"""Reads JSON files that hold one object, such as configurations and vocabularies."""

import json
import os
from pathlib import Path

# Deeper nesting is refused, because deepcopy and repr recurse into nested values and would fail later.
_DEEPEST = 100


def read_object(path: str | os.PathLike) -> dict:
    """Returns the object in a JSON file.

    Raises:
        ValueError: the file is not JSON, holds something else, or is nested more than 100 deep.
    """
    name = os.fspath(path)
    too_deep = ValueError(f"{name} is nested too deeply, at most {_DEEPEST} levels are read")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise too_deep from None
    except ValueError as error:  # The text is not JSON or not UTF-8, or has a number of thousands of digits.
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold a JSON object, got {type(content).__name__}")
    level = [content]
    for _ in range(_DEEPEST):
        level = [x for outer in level for x in (outer.values() if isinstance(outer, dict) else outer)]
        level = [x for x in level if isinstance(x, dict | list)]
    if level:
        raise too_deep
    return content
