"""Reads bpe_encoder.bin, Microsoft's tokenizer file of DeBERTa v1, and runs no code that it may carry."""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

# torch.save's older format is four pickles: this number, the format's version, sizes of C types, the object.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
KEYS = ("dict_map", "vocab", "encoder")
FIRST = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
MASK = "[MASK]"


def read_bpe_encoder(path: str | Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Reads the id of every piece, and the merges in their order.

    The file holds a dict: ``encoder`` gives GPT-2's id of every piece, ``vocab`` the merges, and ``dict_map`` lists
    GPT-2's ids, as text, in the order of DeBERTa's own. These begin with [PAD] 0, [CLS] 1, [SEP] 2, [UNK] 3 and end
    with [MASK]. Words of ``dict_map`` that are not an id of ``encoder`` (fillers) are pieces themselves.

    Raises ValueError if the file is damaged, or if its pickle needs anything except plain data.
    """
    content = Path(path).read_bytes()
    try:
        return _tables(_load(content))
    except Exception as error:  # damaged pickles raise many classes: KeyError, IndexError, AttributeError, ...
        reason = f"{error}" if isinstance(error, ValueError | pickle.UnpicklingError) else repr(error)
        raise ValueError(f"{path} is not a bpe_encoder.bin, or is damaged: {reason}") from error


# The unpickler in C allocates as much memory as a forged index asks for; the one in Python does not.
class _PlainUnpickler(pickle._Unpickler):
    """Makes only containers, text and numbers."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only plain data is read")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it asks for a tensor; only plain data is read")


def _load(content: bytes):
    if content[:4] == b"PK\3\4":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
            if len(names) != 1:
                raise ValueError(f"expected one data.pkl in it, got {len(names)}")
            # torch.save does not compress. Compressed data could be much larger than the file.
            if archive.getinfo(names[0]).compress_type != zipfile.ZIP_STORED:
                raise ValueError("its data.pkl is compressed")
            return _PlainUnpickler(io.BytesIO(archive.read(names[0]))).load()
    stream = io.BytesIO(content)
    if _PlainUnpickler(stream).load() != LEGACY_MAGIC:
        raise ValueError("it was not written by torch.save")
    return [_PlainUnpickler(stream).load() for _ in range(3)][-1]


def _tables(content) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if not isinstance(content, dict) or not all(key in content for key in KEYS):
        found = [x for x in content if isinstance(x, str)] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected a dict with {', '.join(KEYS)}, got {found}")
    dict_map, merges, encoder = (content[key] for key in KEYS)
    if not isinstance(encoder, dict):
        raise ValueError(f"expected encoder to be a dict, got {type(encoder).__name__}")
    _check_rows("encoder", list(encoder.items()), (str, int))
    _check_rows("dict_map", dict_map, (str, int))  # the second item, a count, is not used
    _check_rows("vocab", merges, (str, str))

    pieces = {str(i): piece for piece, i in encoder.items()}
    vocab = {}
    for word in [*FIRST, *(pieces.get(word, word) for word, _ in dict_map), MASK]:
        vocab.setdefault(word, len(vocab))
    for left, right in merges:
        for piece in (left, right, left + right):
            if piece not in vocab:
                raise ValueError(f"its merges need the piece {piece!r}, which dict_map does not have")
    return vocab, [*map(tuple, merges)]


def _check_rows(key: str, rows, kinds: tuple[type, type]):
    if not isinstance(rows, list | tuple):
        raise ValueError(f"expected {key} to be a list, got {type(rows).__name__}")
    for row in rows:
        if not (isinstance(row, list | tuple) and len(row) == 2 and all(map(isinstance, row, kinds))):
            raise ValueError(f"expected {key} to hold pairs of {kinds[0].__name__} and {kinds[1].__name__} only")
