"""fill-mask: the likeliest tokens in the places of masks."""

import dataclasses
import itertools
import warnings
from collections.abc import Iterable

import torch

from ..models.task_models import DebertaForMaskedLM
from .base import InputError, Pipeline, Row, check_number, lengths_of


class FillMaskPipeline(Pipeline):
    """The likeliest tokens for every mask of a text.

    A result is a list of ``{"score", "token", "token_str", "sequence"}``, the likeliest first. A text with several
    masks gives one such list per mask, and ``sequence`` keeps the other masks. As in Hugging Face's pipeline, a list
    of one text gives that text's result.
    """

    task = "fill-mask"
    head = DebertaForMaskedLM

    @dataclasses.dataclass(frozen=True)
    class Options:
        """
        top_k: number of tokens per mask.
        targets: tokens to choose from, one or a list; the first token stands for a text that is not a token.
        truncation, max_length: the tokenizer's, which shortens nothing by default.
        tokenizer_kwargs: the same two under Hugging Face's name, and other options of the tokenizer.
        """

        top_k: int = 5
        targets: str | list[str] | None = None
        truncation: bool | str = False
        max_length: int | None = None
        tokenizer_kwargs: dict | None = None

        def __post_init__(self):
            check_number("top_k", self.top_k, 1)

    def resolved(self, options):
        if self.tokenizer.mask_token_id is None:
            raise ValueError("fill-mask needs a tokenizer with a mask_token")
        return options if options.targets is None else dataclasses.replace(options, targets=self._ids(options.targets))

    def list_result(self, results):
        return results[0] if len(results) == 1 else results

    def rows(self, items, options):
        rows = self.encode_texts(items, options, options.tokenizer_kwargs)
        mask = self.tokenizer.mask_token_id
        for index, row in enumerate(rows):
            row.about = [place for place, token in enumerate(row.input_ids) if token == mask]
            if not row.about:
                cut = "; it was truncated" if self.tokenizer.mask_token in items[index] else ""
                raise InputError(index, f"it has no mask token ({self.tokenizer.mask_token}){cut}")
        return [[row] for row in rows]

    def outputs(self, inputs: dict, rows: list[Row], options) -> Iterable:
        numbers = [len(row.about) for row in rows]
        starts = itertools.accumulate(lengths_of(rows), initial=0)
        places = torch.tensor([start + place for start, row in zip(starts, rows) for place in row.about])
        # The head runs on the masked places only: scores of all tokens of a long batch would fill many gigabytes.
        states, _ = self.model.predicting_states(**inputs)
        states = self.unpadded(states, inputs)[places.to(self.model.device)]
        scores = self.model.lm_predictions(states, self.model.get_input_embeddings()).float().softmax(-1)
        if options.targets is not None:
            scores = scores[:, options.targets]
        top = scores.topk(min(options.top_k, scores.shape[1]))
        tokens = top.indices if options.targets is None else torch.tensor(options.targets)[top.indices.cpu()]
        return zip(top.values.cpu().split(numbers), tokens.cpu().split(numbers))

    def answer(self, item, rows, outputs, options):
        [row], [(scores, tokens)] = rows, outputs
        single = len(row.about) == 1
        result = []
        for place, best_scores, best_tokens in zip(row.about, scores.tolist(), tokens.tolist()):
            result.append([])
            for score, token in zip(best_scores, best_tokens):
                ids = [*row.input_ids[:place], token, *row.input_ids[place + 1 :]]
                ids = [x for x in ids if x != self.tokenizer.pad_token_id]
                result[-1].append(
                    {
                        "score": score,
                        "token": token,
                        "token_str": self.tokenizer.decode([token]),
                        "sequence": self.tokenizer.decode(ids, skip_special_tokens=single),
                    }
                )
        return result[0] if single else result

    def _ids(self, targets: str | list[str]) -> list[int]:
        vocabulary, ids = self.tokenizer.get_vocab(), {}
        for target in [targets] if isinstance(targets, str) else targets:
            token = vocabulary.get(target)
            if token is None:
                tokens = self.tokenizer(target, add_special_tokens=False)["input_ids"]
                if not tokens:
                    warnings.warn(f"target {target!r} is no token, and has none: it is left out")
                    continue
                token = tokens[0]
                first = self.tokenizer.convert_ids_to_tokens(token)
                warnings.warn(f"target {target!r} is no token: {first!r} stands for it")
            ids[token] = None
        if not ids:
            raise ValueError("targets must hold at least one token")
        return list(ids)
