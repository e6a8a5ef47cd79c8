"""The demonstration at toy size, on labelled sentences of the test's own; and its parts."""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import movie_reviews
    import pretrain_demo

    return movie_reviews, pretrain_demo


def test_demo(demo, tmp_path, capsys):
    sentences = [(f"a {'fine' if i % 2 else 'dull'} film of {i} minutes", i % 2) for i in range(120)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": x, "label": y}) + "\n" for x, y in sentences))
    out = tmp_path / "out"
    options = ["--out", str(out), "--snippets", str(tmp_path / "s.jsonl")]
    results = demo[1].main([*options, *"--toy --seeds 2 --epochs 1 --own-text --precision bf16".split()])
    assert "precision: bf16\n" in (out / "settings.yaml").read_text()
    text = [(out / f"{name}.txt").read_text() for name in ("train", "held-out")]
    assert all(x in text[0] and x not in text[1] for x, _ in sentences[:90])
    assert not any(x in text[0] for x, _ in sentences[90:])
    assert results == json.loads((out / "comparison.json").read_text()) and results["snippets"] == 90
    assert [len(results[kind]) for kind in ("pretrained", "new")] == [2, 2]
    assert all(0 <= x <= 1 for x in results["pretrained"] + results["new"])
    assert (out / "run" / "losses.png").is_file() and (out / "discriminator" / "model.safetensors").is_file()
    assert "better than the best new one" in capsys.readouterr().out


def test_english_of_a_module(demo, tmp_path):
    path = tmp_path / "m.py"
    path.write_text('"""What it is."""\n# one line\n# another\nx = "no text"\ndef f():\n    """It returns\n    x."""\n')
    assert demo[1].english(path) == ["What it is.", "It returns x.", "one line another"]
    path.write_text("def (:\n")
    assert demo[1].english(path) == []


def archive(folder, rows):
    """An archive with the layout of the real one."""
    movie_reviews = sys.modules["movie_reviews"]
    content = "".join(f"{i}\t{rating}\t{text}\n" for i, (rating, text) in enumerate(rows)).encode()
    inner, outer = io.BytesIO(), folder / movie_reviews.ARCHIVE
    for target, name, data in ((inner, movie_reviews.RATED, content), (outer, movie_reviews.INNER, None)):
        with tarfile.open(**({"fileobj": target} if target is inner else {"name": target}), mode="w:gz") as file:
            data = inner.getvalue() if data is None else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return outer


def test_snippets(demo, tmp_path, monkeypatch):
    movie_reviews = demo[0]
    rows = [((-1) ** i * (0.6 + i / 100), f"film  {i}") for i in range(40)] + [(0.4, "so so"), (-0.49, "hm")]
    path = archive(tmp_path, rows)
    with pytest.raises(SystemExit, match="is not the expected file: remove it"):
        movie_reviews.snippets(tmp_path)
    monkeypatch.setattr(movie_reviews, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(movie_reviews, "TEST", 10)
    train, test = movie_reviews.snippets(tmp_path)
    assert (len(train), len(test)) == (30, 10) and not {x for x, _ in train} & {x for x, _ in test}
    assert all(label == 1 - int(text.split()[1]) % 2 for text, label in train + test)


def test_no_network(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo[0], "PACKAGE", "no-such-package-of-this-name==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match="could not be downloaded: put vaderSentiment-3.3.2.tar.gz into"):
        demo[0].fetched(tmp_path)
