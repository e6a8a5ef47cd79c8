"""bert-score on a patched model."""

import bert_score
import pytest
from tiny import TEXTS, folder, models

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:bert_score")


@models
def test_scores(name, options, same_when_patched):
    def build():
        scorer = bert_score.BERTScorer(model_type=folder(name), num_layers=2, idf=True, idf_sents=TEXTS, device="cpu")
        return scorer, scorer._model

    run = lambda scorer: list(scorer.score(TEXTS, TEXTS[1:] + TEXTS[:1]))
    got = same_when_patched(build, run, **options)
    assert all((x != 0).all() for x in got)
