import importlib.util
import itertools

import pytest
from tokenizer_files import sentences

from deberta_fast import DebertaV2Tokenizer, DebertaV2TokenizerFast
from deberta_fast.pretraining import vocabulary
from deberta_fast.pretraining.sources import Sources
from deberta_fast.pretraining.vocabulary import train_tokenizer

TEXTS = ["A sequence of items, or a class statement.", "strings  and\nbytes [MASK] x", "ﬁle ① 100"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "new"
    train_tokenizer(Sources(texts=sentences() + ["file 1"]), folder, vocab_size=500)
    return folder


def test_special_tokens_have_the_ids_of_v3(folder):
    tokenizer = DebertaV2Tokenizer.from_pretrained(folder)
    assert [tokenizer.convert_tokens_to_ids(f"[{name}]") for name in ("PAD", "CLS", "SEP", "UNK")] == [0, 1, 2, 3]
    assert (tokenizer.vocab_size, tokenizer.mask_token_id, len(tokenizer)) == (500, 500, 501)
    assert tokenizer("items")["input_ids"][:: len(tokenizer("items")["input_ids"]) - 1] == [1, 2]
    assert tokenizer.decode(tokenizer.encode(TEXTS[0], add_special_tokens=False)) == TEXTS[0]
    assert tokenizer("ﬁle ①")["input_ids"] == tokenizer("file 1")["input_ids"]  # nmt_nfkc


def test_the_fast_tokenizer_reads_the_folder(folder):
    ours = DebertaV2Tokenizer.from_pretrained(folder)
    fast = DebertaV2TokenizerFast.from_pretrained(folder)
    assert fast(TEXTS)["input_ids"] == ours(TEXTS)["input_ids"]
    assert fast.get_vocab() == ours.get_vocab()


def test_transformers_reads_the_folder(folder):
    transformers = pytest.importorskip("transformers")
    if not transformers.__version__.startswith("5.") and not importlib.util.find_spec("google.protobuf"):
        pytest.skip("transformers 4 reads spm.model with protobuf")
    ours = DebertaV2Tokenizer.from_pretrained(folder)
    theirs = [transformers.AutoTokenizer.from_pretrained(folder)]
    theirs.append(transformers.DebertaV2TokenizerFast.from_pretrained(folder))
    for tokenizer in theirs:
        assert tokenizer(TEXTS[:2])["input_ids"] == ours(TEXTS[:2])["input_ids"]
        assert (len(tokenizer), tokenizer.mask_token_id) == (501, 500)


def test_lowercase_is_learned_and_saved(tmp_path):
    texts = [line.upper() for line in sentences()]
    tokenizer = train_tokenizer(Sources(texts=texts), tmp_path / "new", vocab_size=300, lowercase=True)
    assert tokenizer.do_lower_case
    pieces = tokenizer.tokenize("THE SEQUENCE")
    assert pieces == tokenizer.tokenize("the sequence") and "[UNK]" not in pieces
    assert not any(piece != piece.lower() for piece in tokenizer.get_vocab() if not piece.startswith("["))


def test_a_sample_depends_on_the_seed(tmp_path):
    texts = list(itertools.islice(itertools.cycle(sentences()), 3000))
    vocab = lambda name, seed: train_tokenizer(
        Sources(texts=texts), tmp_path / name, vocab_size=120, max_sentences=300, seed=seed
    ).get_vocab()
    first = vocab("a", 1)
    assert vocab("b", 1) == first
    assert vocab("c", 2) != first


def test_long_lines_are_cut():
    words = [f"word{i}" for i in range(2000)]
    parts = list(vocabulary._cut(" ".join(words)))
    assert max(map(len, parts)) <= 1024 and len(parts) > 10
    assert " ".join(parts).split() == words
    assert list(map(len, vocabulary._cut("長" * 3000))) == [1024, 1024, 952]
    assert len("𠀀" * vocabulary._CHARACTERS) * 4 <= vocabulary._BYTES


def test_long_lines_are_learned_from(tmp_path):
    """sentencepiece leaves out lines that are too long."""
    text = " ".join(sentences()).replace("\n", " ")
    assert len(train_tokenizer(Sources(texts=[text]), tmp_path / "new", vocab_size=300)) == 301


def test_too_little_text_says_how_many_pieces_are_possible(tmp_path):
    sources = Sources(texts=sentences()[:40])
    with pytest.raises(ValueError, match="vocab_size=5000 is too many: there is text for") as raised:
        train_tokenizer(sources, tmp_path / "new", vocab_size=5000)
    possible = int(str(raised.value).split("text for ")[1].split()[0])
    assert len(train_tokenizer(sources, tmp_path / "new", vocab_size=possible)) == possible + 1
    with pytest.raises(ValueError, match="vocab_size=20 is too few: characters .* alone need"):
        train_tokenizer(sources, tmp_path / "other", vocab_size=20)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["spm.model", "tokenizer.json", "vocab.json"])
def test_a_tokenizer_is_never_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"holds {name} already"):
        train_tokenizer(Sources(texts=sentences()), tmp_path, vocab_size=300)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_errors_of_the_sources_are_not_the_end_of_the_text(tmp_path):
    readings = []

    def texts():
        readings.append(0)
        yield from (sentences() * 9)[:300]
        if len(readings) == 3:  # checked, counted, and now learned from
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train_tokenizer(Sources(texts=texts), tmp_path / "new", vocab_size=100)
    assert len(readings) == 3


def test_a_sample_has_so_many_lines_from_everywhere():
    lines = [f"line {i}" for i in range(1000)]
    sample = list(vocabulary._Sample(Sources(texts=lines), False, 100, 7))
    assert len(sample) == len(set(sample)) == 100
    numbers = [int(line.split()[1]) for line in sample]
    assert numbers == sorted(numbers) and 350 < sum(numbers) / 100 < 650
    assert list(vocabulary._Sample(Sources(texts=lines), False, 1000, 7)) == lines


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(vocab_size=4), "vocab_size must be an integer of 5 or more"),
        (dict(max_sentences=0), "max_sentences must be"),
        (dict(seed=-1), "seed must be"),
        (dict(character_coverage=0.5), "character_coverage must be from 0.98 to 1"),
        (dict(normalization="nfd"), "normalization must be one of nmt_nfkc"),
    ],
)
def test_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(Sources(texts=["a"]), tmp_path / "new", **options)
    with pytest.raises(TypeError, match="must be Sources"):
        train_tokenizer(["a"], tmp_path / "new")
