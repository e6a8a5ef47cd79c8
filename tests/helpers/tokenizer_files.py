"""Texts, and tokenizer files written once per run: sentencepiece and byte-level BPE models trained on these texts."""

import functools
import json
import pydoc_data.topics
import random
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest
import torch

sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")

WORLD = """
天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。 我今天去图书馆看书，明天再回家。 人工智能正在改变我们的生活方式。
吾輩は猫である。名前はまだ無い。 東京は日本の首都です。カタカナとひらがなと漢字を使います。
모든 사람은 태어날 때부터 자유롭고 평등하다. 오늘은 날씨가 좋아서 공원에 갔다.
يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. اللغة العربية تكتب من اليمين إلى اليسار.
כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. שלום עולם, מה שלומך היום?
Все люди рождаются свободными и равными в своём достоинстве и правах. Сегодня хорошая погода.
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतंत्रता प्राप्त है।
มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน วันนี้อากาศดี
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ναΐ́σκος, Ὀδυσσεύς. Zażółć gęślą jaźń. Příliš žluťoučký kůň. İstanbul’da ışık.
Voix ambiguë d’un cœur qui préfère les jattes de kiwis. Größe, Straße, Öl. 1 234,56 € — 50 % … “quoted” «texte»
""".strip().splitlines()

SPECIAL = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3)
SPECIAL |= dict(pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]")
SENTENCEPIECE = {
    "english": dict(vocab_size=1000),
    "bytes": dict(vocab_size=1100, byte_fallback=True),
    "world": dict(vocab_size=1500, character_coverage=1.0),
    "symbols": dict(vocab_size=900, user_defined_symbols=["<entity>", "@@"], control_symbols=["[MASK]", "<control>"]),
    "bpe": dict(vocab_size=700, model_type="bpe"),
    "characters": dict(vocab_size=90, model_type="char"),
}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="tokenizers-")


@functools.cache
def sentences() -> list[str]:
    text = "\n".join(pydoc_data.topics.topics[name] for name in ("typesseq", "strings", "class", "with", "import"))
    return [" ".join(line.split()) for line in text.split(".") if line.strip()]


def spm_folder(kind: str = "english") -> Path:
    """A folder that holds only spm.model."""
    return _trained(kind)


@functools.cache
def _trained(kind: str) -> Path:
    folder = Path(_folder().name) / kind
    folder.mkdir()
    lines = sentences() + (WORLD * 20 if kind in ("world", "bytes") else [])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spm"),
        **SPECIAL | SENTENCEPIECE[kind],
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=3,
    )
    (folder / "spm.vocab").unlink()
    return folder


def spm_model(kind: str = "english") -> str:
    return str(spm_folder(kind) / "spm.model")


@functools.cache
def processor(kind: str = "english"):
    """sentencepiece's own tokenizer."""
    return sentencepiece.SentencePieceProcessor(model_file=spm_model(kind))


@functools.cache
def _gpt2() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids and merges as GPT-2 has them, without DeBERTa's special tokens."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences() + WORLD, vocab_size=900, min_frequency=2, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save_model(folder)
        encoder = json.loads((Path(folder) / "vocab.json").read_text("utf-8"))
        lines = (Path(folder) / "merges.txt").read_text("utf-8").splitlines()
    encoder["<|endoftext|>"] = len(encoder)
    return encoder, [tuple(line.split()) for line in lines[1:]]


@functools.cache
def byte_level() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """DeBERTa's ids and merges: [PAD] 0, [CLS] 1, [SEP] 2, [UNK] 3, then GPT-2's pieces in an order of their own."""
    encoder, merges = _gpt2()
    words = [word for word, _ in dict_map()]
    pieces = {str(i): piece for piece, i in encoder.items()}
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(pieces.get(word, word) for word in words), "[MASK]"]
    return {piece: i for i, piece in enumerate(pieces)}, merges


@functools.cache
def byte_level_folder() -> Path:
    """A folder with vocab.json and merges.txt."""
    folder = Path(_folder().name) / "byte-level"
    folder.mkdir()
    vocab, merges = byte_level()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges), "utf-8"
    )
    return folder


@functools.cache
def byte_level_files() -> tuple[str, str]:
    return str(byte_level_folder() / "vocab.json"), str(byte_level_folder() / "merges.txt")


@functools.cache
def dict_map() -> list[tuple[str, int]]:
    """GPT-2's ids as text with their counts, the most frequent first, and filler words at the end."""
    ids = list(_gpt2()[0].values())
    random.Random(1).shuffle(ids)
    return [(str(i), 5 * (len(ids) - n)) for n, i in enumerate(ids)] + [(f"madeupword000{n}", 0) for n in range(3)]


def bpe_encoder() -> dict:
    """The content of Microsoft's bpe_encoder.bin."""
    encoder, merges = _gpt2()
    return {"dict_map": dict_map(), "vocab": merges, "encoder": encoder}


def save_bpe_encoder(path, content=None, legacy=True) -> str:
    torch.save(bpe_encoder() if content is None else content, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


SPACES = [c for c in map(chr, range(0x3001)) if c.isspace() or unicodedata.category(c).startswith("Z")]
INVISIBLE = list(
    "\u200b\u200c\u200d\u200e\u200f\u2060\u2066\u2069\u202a\u202e\ufeff\xad\u034f\u180e\ufffd\ufe0f\U000e0041"
)
CONTROLS = [chr(i) for i in [*range(32), *range(127, 160)]]
EMOJI = "😀 👍🏽 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇩🇪 ❤️ 1️⃣ 👨🏿‍🚒 🧑‍⚕️ \U0001fae8".split()
MARKS = "é e\u0301 ộ o\u0323\u0302 Å A\u030a \u0301a ñ\u0303\u0303\u0303 ᄒ\u1161ᆫ 한 Z\u0335\u0327\u0334a".split()
NFKC = "ﬁ ① ｆｕｌｌ ｶﾀｶﾅ … ½ x² ™ ℌ Ⅳ ㌀ ﷺ ſ ª ǆ ⑴ 𝐁𝐨𝐥𝐝 µ K ㈱ ‥ ‼ 。".split()
ODD = (
    r"""
▁;▁▁;a▁b;▁a;a▁; ▁ a ▁ ;a ▁b;▁ ▁;_;＿;Ġ;Ġa;Ċ;a;.;?!;don't;I'LL we've o'clock 'S;C++ == c#;a.b,c:d:e;¿Qué?—«sí»
(a)[b]{c}<d>;^$`|~+=<>;<0x41>;<0x00>;<unk>;<s>;</s>;<pad>;<entity>;@@;a<entity>b;[unk];[MASK;MASK];[ [MASK ]];\n;%s
https://example.org/a?b=c&d=%20#e;user.name+tag@example.co.uk;3.14159e-10;1,234,567;0x7F;2026-11-22T20:46Z;  lead
trail  ;two  spaces;İI ıi ẞß ΣσςΌΣ ǅ ﬀ;ΑΣ;ÀÉÎ;TITLE Case lower;日本語テキスト;שלום עולם;مرحبا بالعالم;مَرْحَبًا;हिन्दी
ภาษาไทย;Ελληνικά;русский;한국어;𠮷野家
""".strip("\n")
    .replace("\n", ";")
    .split(";")
)
ODD += [
    "",
    " ",
    "  ",
    "\n",
    "tab\tseparated",
    "line\nbreak",
    "cr\r\nlf",
    "a \xa0 b",
    "a\u3000b",
    "\ufeffbom",
    "\U0010ffff",
]
ODD += ["\ue000", "a" * 300, "ab" * 1000, "x" * 40 + " " + "y" * 40, ";"]
SPECIALS = ["[MASK]", "[CLS]", "[SEP]", "[PAD]", "[UNK]"]
POOLS = [
    "abcdefghijklmnopqrstuvwxyz     ",
    "ABCdef 0123456789 .,;:!?'\"-()[]{}/\\@#$%^&*_=+<>|~`",
    " \t\n\r\u00a0\u2003\u200b\u3000ab▁",
    "éèêàùôïçñßøåæœłžšİı ÀÉ" + "\u0300\u0301\u0327\u0323",
    "".join(WORLD),
    "".join(EMOJI) + " a",
    "".join(NFKC) + " a.",
]


@functools.cache
def texts() -> tuple[str, ...]:
    """More than 2,000 texts without special tokens, the same ones every time."""
    result = [*ODD, *EMOJI, *MARKS, *NFKC, *INVISIBLE, *SPACES, *CONTROLS, *WORLD]
    for c in SPACES + INVISIBLE + CONTROLS:
        result += [f"a{c}b", f"{c}a b{c}", f"a {c} b", f"word{c * 3}.{c}"]
    for extra in EMOJI + MARKS + NFKC:
        result += [f"x{extra}y", f"a {extra} b.", extra * 3]
    # One of every 37 characters that NFKC changes.
    characters = [chr(i) for i in range(sys.maxunicode) if not 0xD800 <= i < 0xE000]
    result += [f"a{c} {c}" for c in [c for c in characters if unicodedata.normalize("NFKC", c) != c][::37]]
    generator = random.Random(0)
    for pool in [*POOLS, characters, characters[32:0x3000]]:
        result += ["".join(generator.choices(pool, k=generator.randint(1, 60))) for _ in range(120)]
    result += sentences()[::3]
    result = list(dict.fromkeys(result))
    assert len(result) > 2000
    return tuple(result)


@functools.cache
def texts_with_specials() -> tuple[str, ...]:
    generator = random.Random(2)
    words = [*SPECIALS, *SPECIALS, "hello", " world", " ", "", "a.", "\n", "é", "日本", "▁", "[", "]"]
    result = [f"{a}{special}{b}" for special in SPECIALS for a in ("", "a", "a ", " ") for b in ("", "b", " b", "  b")]
    return tuple(result + ["".join(generator.choices(words, k=generator.randint(2, 8))) for _ in range(150)])
