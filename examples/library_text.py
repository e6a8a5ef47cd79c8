"""Text that comes with Python, and a tokenizer trained on it, for the examples with long documents."""

import io
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from deberta_fast import DebertaV2Config, DebertaV2Tokenizer

PACKAGES = ("asyncio", "ctypes", "email", "importlib", "multiprocessing", "xml")
# DeBERTa-v3's ids; [MASK] comes next
SPECIAL = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]")


def modules() -> list[tuple[str, int]]:
    """Returns the source of every module of ``PACKAGES`` in the standard library, and the number of its package."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for number, package in enumerate(PACKAGES):
        for path in sorted((root / package).rglob("*.py")):
            if "test" not in path.parts and path.stat().st_size > 0:
                found.append((path.read_text(encoding="utf-8", errors="replace"), number))
    if not found:
        sys.exit(f"no sources of {', '.join(PACKAGES)} in {root}: this Python has no text to train on")
    return found


def trained_tokenizer(texts: Iterable[str], size: int, folder: Path) -> DebertaV2Tokenizer:
    """Trains a sentencepiece model like DeBERTa-v3's and saves the tokenizer in ``folder``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line.strip()),
        model_writer=model,
        model_type="unigram",
        vocab_size=size,
        hard_vocab_limit=False,  # the text may yield fewer pieces
        unk_piece="[UNK]",
        user_defined_symbols=["[MASK]"],
        minloglevel=2,
        **SPECIAL,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spm.model").write_bytes(model.getvalue())
    return DebertaV2Tokenizer(folder / "spm.model")


def loaded(kind: type, checkpoint: Path, **changes):
    """Loads a model and the tokenizer of its folder; ends the program with one line if there are none."""
    try:
        tokenizer = DebertaV2Tokenizer.from_pretrained(checkpoint)
        return kind.from_pretrained(checkpoint, **changes).train(), tokenizer
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"--checkpoint {checkpoint}: no DeBERTa v2 or v3 with its spm.model can be loaded: {error}")


def small_config(vocabulary: int, toy: bool, **changes) -> DebertaV2Config:
    """Makes the configuration of a small DeBERTa v3, whose positions are relative alone."""
    layers, hidden, heads, buckets, longest = (2, 64, 2, 32, 64) if toy else (4, 256, 4, 256, 512)
    return DebertaV2Config(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        position_buckets=buckets,
        max_position_embeddings=longest,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        type_vocab_size=0,
        **changes,
    )
