"""Sentences of film reviews, rated by people, for examples that need labelled text.

They are "movieReviewSnippets" of Hutto and Gilbert's study (VADER, ICWSM 2014): 10,605 sentences of reviews on
rottentomatoes.com, each with the mean of 20 people's ratings, from -4 to 4. The authors publish them, under the MIT
licence, inside the source archive of their package vaderSentiment, which pip downloads; nothing of it is installed.
"""

import hashlib
import io
import random
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE, ARCHIVE = "vaderSentiment==3.3.2", "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATED = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
UNDECIDED = 0.5  # sentences whose mean rating is nearer to 0 are left out: people do not agree on them
TEST = 2000

Labelled = list[tuple[str, int]]


def snippets(folder: Path) -> tuple[Labelled, Labelled]:
    """Returns (sentence, 1 if it praises and 0 if not) for training, 8,072 of them, and for the test, 2,000.

    The archive is downloaded into ``folder`` if it is not there.
    """
    archive = fetched(folder)
    with tarfile.open(archive) as outer, tarfile.open(fileobj=io.BytesIO(outer.extractfile(INNER).read())) as inner:
        lines = inner.extractfile(RATED).read().decode("utf-8").splitlines()
    labelled = []
    for line in lines:
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= UNDECIDED:
            labelled.append((" ".join(text.split()), int(float(rating) > 0)))
    random.Random(0).shuffle(labelled)
    return labelled[TEST:], labelled[:TEST]


def fetched(folder: Path) -> Path:
    """Downloads the archive if it is not there, and checks it; ends the program with one line if that fails."""
    archive = folder / ARCHIVE
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--disable-pip-version-check", PACKAGE, "-d", str(folder)]
        if subprocess.run(command).returncode:
            sys.exit(f"{PACKAGE} could not be downloaded: put {ARCHIVE} into {folder} by hand")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{archive} is not the expected file: remove it, and it will be downloaded again")
    return archive
