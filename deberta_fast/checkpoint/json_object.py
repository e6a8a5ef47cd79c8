"""JSON files that hold one object: configurations, vocabularies."""

import json
import os
from pathlib import Path

# Python's own functions (copies, texts) recurse into what is nested.
_DEEPEST = 100


def read_object(path: str | os.PathLike) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: the file holds something else, or is nested more than 100 deep; names the file, and the line if it
            is no JSON.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{os.fspath(path)} is not valid JSON: {place}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{os.fspath(path)} is nested too deeply, at most {_DEEPEST} levels are read") from None
    except ValueError as error:  # no UTF-8; a number of thousands of digits
        raise ValueError(f"{os.fspath(path)} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)} must hold a JSON object, got {type(content).__name__}")
    level = [content]
    for _ in range(_DEEPEST):
        level = [x for outer in level for x in (outer.values() if isinstance(outer, dict) else outer)]
        level = [x for x in level if isinstance(x, dict | list)]
    if level:
        raise ValueError(f"{os.fspath(path)} is nested too deeply, at most {_DEEPEST} levels are read")
    return content
