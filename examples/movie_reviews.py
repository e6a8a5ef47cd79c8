"""About 10,000 sentences from film reviews with the sentiment that people read in them, for the examples.

    python examples/movie_reviews.py [FOLDER]    # fetches them, and prints how many there are and a few of them

They lie in the source archive of vaderSentiment 3.3.2 on PyPI, as movieReviewSnippets_GroundTruth.txt in
hutto_ICWSM_2014. By the archive's own description these are 10,605 snippets the length of a sentence from
rotten.tomatoes.com, cut by a sentence tokenizer from the 2,000 reviews of Pang & Lee (2004); at least 20 screened
people rated each from -4 to 4, and the file holds the mean. Cite: C.J. Hutto and E. Gilbert, VADER: A Parsimonious
Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM 2014. Licence: MIT (LICENSE.txt in the archive).
"""

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

FOLDER = Path("build/vader")
PACKAGE, ARCHIVE = "vaderSentiment==3.3.2", "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATED = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
UNDECIDED = 0.5  # people disagreed where the mean is smaller, so there is no right answer
TEST = 2000

Labelled = list[tuple[str, int]]


def snippets(folder: Path = FOLDER) -> tuple[Labelled, Labelled]:
    """Returns the texts for training and those for the test, each with its label: 1 if the mean rating is positive.

    Snippets whose mean is between -0.5 and 0.5 are left out, one in twenty. The ids are only running numbers: they do
    not tell which review a snippet is from. So each snippet goes by itself, by a hash of its text, and a text that
    comes twice is taken once. The split is the same everywhere.
    """
    return split(rated(fetched(folder)), TEST)


def fetched(folder: Path = FOLDER) -> Path:
    """Returns the archive in ``folder``. Downloads it with pip if it is not there; ends the program if it cannot."""
    path = Path(folder) / ARCHIVE
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--disable-pip-version-check", "--retries", "1", PACKAGE, "-d", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0 or not path.exists():
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            sys.exit(f"{PACKAGE} could not be downloaded: put {ARCHIVE} into {folder} by hand (pip: {last})")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{path} is not the expected file: remove it (its SHA-256 must be {SHA256}, got {found})")
    return path


def rated(path: Path) -> list[tuple[str, float]]:
    """Returns all snippets with their mean ratings, -4 to 4, read from inside the archive."""
    with tarfile.open(path) as outer:
        inner = outer.extractfile(INNER).read()  # type: ignore[union-attr]
    with tarfile.open(fileobj=io.BytesIO(inner)) as data:
        lines = data.extractfile(RATED).read().decode("utf-8").strip().split("\n")  # type: ignore[union-attr]
    rows = [line.split("\t") for line in lines]
    return [(" ".join(text.split()), float(mean)) for _, mean, text in rows]


def split(rows: list[tuple[str, float]], test: int) -> tuple[Labelled, Labelled]:
    """Labels the snippets that people agreed on, and returns those for training and ``test`` others."""
    texts = {text: int(mean > 0) for text, mean in rows if abs(mean) >= UNDECIDED}
    mixed = sorted(texts.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    return mixed[test:], mixed[:test]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="of the download")
    train, test = snippets(parser.parse_args().folder)
    for name, part in (("train", train), ("test", test)):
        print(f"{name}: {len(part)} snippets, {sum(label for _, label in part) / len(part):.3f} positive")
    for text, label in train[:5]:
        print(label, text)
