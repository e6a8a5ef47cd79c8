"""Trains the tokenizer for a model that is pretrained from scratch."""

import io
import os
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..tokenization import DebertaV2Tokenizer
from .sources import Sources

# The ids of DeBERTa v3. [MASK] follows behind the pieces, because the tokenizer adds what the model lacks.
_SPECIAL = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3)
_SPECIAL |= dict(pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]")
_FILES = ("spm.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FILES += ("vocab.json", "merges.txt", "bpe_encoder.bin")  # of DeBERTa v1
_NORMALIZATIONS = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity")
# Characters of a line at most: in UTF-8 less than _BYTES, beyond which sentencepiece leaves a line out.
_CHARACTERS, _BYTES = 1024, 4 * 1024
# Lines from which sentencepiece gets indices of 64 bits; with fewer, 2^31 characters are never reached.
_MANY_LINES = 2**31 // _CHARACTERS
_THREADS = 16  # The result may depend on their number, so that is not the number of cores.


def train_tokenizer(
    sources: Sources,
    folder: str | os.PathLike,
    *,
    vocab_size: int = 128000,
    character_coverage: float = 0.9995,
    max_sentences: int = 10_000_000,
    seed: int = 0,
    lowercase: bool = False,
    normalization: str = "nmt_nfkc",
) -> DebertaV2Tokenizer:
    """Trains a sentencepiece unigram model on the lines of the documents, and saves a tokenizer like DeBERTa v3's.

    [PAD], [CLS], [SEP] and [UNK] have the ids 0 to 3. [MASK] comes behind the pieces, with the id ``vocab_size``, so
    that a model needs embeddings of ``len(tokenizer)`` = vocab_size + 1 rows or more.

    Args:
        sources: the documents.
        folder: gets spm.model and tokenizer_config.json; it is made if it does not exist. DebertaV2TokenizerFast
            and transformers read it too. (transformers 5 leaves out the normalization: ids differ for characters that
            it changes, such as "ﬁ".)
        vocab_size: number of pieces with the four special ones.
        character_coverage: part of the text whose characters become pieces; others are [UNK].
        max_sentences: lines, of up to 1024 characters, to learn from: a random sample if there are more. Memory grows
            with it. The sources are read twice, first to count the lines.
        seed: of the sample.
        lowercase: the tokenizer converts text to lower case, here as well as later.
        normalization: sentencepiece's rule for characters: nmt_nfkc, nfkc, nmt_nfkc_cf, nfkc_cf or identity.

    Raises:
        FileExistsError: folder holds a tokenizer.
        ValueError: there is too little text for so many pieces (the message says how many are possible), or too few
            pieces for the characters; an argument is out of range; the sources hold no text, or what they raise.
    """
    try:
        import sentencepiece
    except ImportError:
        raise ImportError("training a tokenizer needs sentencepiece: pip install sentencepiece") from None
    if not isinstance(sources, Sources):
        raise TypeError(f"sources must be Sources, got {type(sources).__name__}")
    for name, value, least in (("vocab_size", vocab_size, 5), ("max_sentences", max_sentences, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of {least} or more, got {value!r}")
    if not 0.98 <= character_coverage <= 1:
        raise ValueError(f"character_coverage must be from 0.98 to 1, got {character_coverage}")
    if normalization not in _NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(_NORMALIZATIONS)}, got {normalization!r}")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    for name in _FILES:
        if (folder / name).exists():
            raise FileExistsError(f"{folder} holds {name} already: give a folder without a tokenizer")
    sources.check()
    lines, model = _Sample(sources, lowercase, max_sentences, seed), io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            normalization_rule_name=normalization,
            max_sentence_length=_BYTES,
            train_extremely_large_corpus=lines.count > _MANY_LINES,
            num_threads=_THREADS,
            minloglevel=2,
            **_SPECIAL,
        )
    except RuntimeError as error:
        raise lines.error or _explained(error, vocab_size) from None
    if lines.error is not None:  # sentencepiece takes an error of the iterator for its end.
        raise lines.error
    with tempfile.TemporaryDirectory() as beside:
        path = Path(beside, "spm.model")
        path.write_bytes(model.getvalue())
        DebertaV2Tokenizer(path, do_lower_case=lowercase).save_pretrained(folder)
    return DebertaV2Tokenizer.from_pretrained(folder)


class _Sample:
    """The lines to learn from, in their order. ``error`` is what the sources raised: sentencepiece does not pass it on.

    sentencepiece could draw a sample too, but with a seed of its own.
    """

    def __init__(self, sources: Sources, lowercase: bool, most: int, seed: int):
        self._sources, self._lowercase, self._seed = sources, lowercase, seed
        self._lines = sum(1 for _ in self._all())
        self.count = min(self._lines, most)
        self.error: BaseException | None = None

    def _all(self) -> Iterator[str]:
        for document in self._sources:
            for line in document.splitlines():
                line = " ".join(line.replace("\0", " ").split())
                if self._lowercase:
                    line = "".join(map(str.lower, line))  # as the tokenizer does
                yield from _cut(line)

    def __iter__(self) -> Iterator[str]:
        draw, left, wanted = random.Random(self._seed).random, self._lines, self.count
        try:
            for line in self._all():
                if draw() * left < wanted:  # So each set of lines is as likely as any other.
                    wanted -= 1
                    yield line
                left -= 1
        except Exception as error:
            self.error = error


def _cut(line: str) -> Iterator[str]:
    """Cuts a line into parts that sentencepiece takes, at spaces where it can."""
    while len(line) > _CHARACTERS:
        end = line.rfind(" ", 1, _CHARACTERS)
        end = _CHARACTERS if end < 0 else end
        yield line[:end]
        line = line[end:].lstrip()
    if line:
        yield line


def _explained(error: RuntimeError, vocab_size: int) -> ValueError:
    """Returns the error of sentencepiece in terms of the arguments."""
    most = re.search(r"value <= (\d+)", str(error))
    if most:
        return ValueError(
            f"vocab_size={vocab_size} is too many: there is text for {most[1]} pieces. Give more text, or a vocab_size "
            f"of {most[1]} or less"
        )
    characters = re.search(r"required_chars\D*(\d+) vs (\d+)", str(error))
    if characters:
        return ValueError(
            f"vocab_size={vocab_size} is too few: characters and special tokens alone need {characters[2]}. Give a "
            "larger vocab_size or a smaller character_coverage"
        )
    return ValueError(f"sentencepiece cannot train on this text: {error}")
