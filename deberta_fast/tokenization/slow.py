"""``SlowTokenizer``, the base of tokenizers in Python."""

import re
from dataclasses import replace
from itertools import groupby

from .base import TokenizerBase
from .batch_encoding import BatchEncoding
from .model_inputs import Options, make_options
from .special_tokens import AddedToken


class SlowTokenizer(TokenizerBase):
    """A tokenizer that finds the added tokens in Python, before the model splits the rest.

    A subclass has ``convert_tokens_to_string``, ``_vocab`` (the ids of the model's own tokens),
    ``_base_id_to_token(index)``, ``_prepare(text, word, add_prefix_space)``, which adds a space before a text or a word
    where it needs one, and ``_tokenize(text)``, which splits a text without added tokens.
    """

    is_fast = False
    do_lower_case = False

    @property
    def vocab_size(self) -> int:
        return len(self._vocab)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(sorted(self._added.items()))

    def get_vocab(self) -> dict[str, int]:
        return {**self._vocab, **self._added_ids}

    def __len__(self) -> int:
        return self.vocab_size + sum(token not in self._vocab for token in self._added_ids)

    def _add_first_tokens(self, decoder: dict[int, AddedToken]):
        self._added: dict[int, AddedToken] = dict(decoder)
        self._added_ids: dict[str, int] = {token.content: index for index, token in decoder.items()}
        self._add_tokens([token for token in self.all_special_tokens_extended if token.content not in self._added_ids])

    def _add_tokens(self, tokens: list[AddedToken]) -> int:
        before = count = len(self)
        for token in tokens:
            content = token.content
            if self.do_lower_case and token.normalized and not token.special:
                content = content.lower()  # The text is in lower case when such tokens are searched for.
                token = replace(token, content=content)
            index = self._added_ids.get(content, self._vocab.get(content))
            if index is None:
                index, count = count, count + 1
            if token.special and content not in self.all_special_tokens:
                self._additional_special_tokens.append(token)
            self._added[index] = token
            self._added_ids[content] = index
        # If two tokens begin at the same place, the longer one matches.
        longest_first = sorted(filter(None, self._added_ids), key=len, reverse=True)
        self._added_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        return count - before

    def _token_to_id(self, token: str) -> int:
        index = self._added_ids.get(token, self._vocab.get(token))
        if index is None and self.unk_token is not None:
            return self._added_ids.get(self.unk_token, self._vocab.get(self.unk_token))
        return index

    def _id_to_token(self, index: int) -> str | None:
        return self._added[index].content if index in self._added else self._base_id_to_token(index)

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options) -> list[str]:
        """Returns the tokens of a text, or of two texts in a row, as text. ``options`` are is_split_into_words,
        split_special_tokens and add_prefix_space: see ``__call__``."""
        options = make_options(options)
        texts = {"$A": text} if pair is None else {"$A": text, "$B": pair}
        for name, value in zip(("text", "pair"), texts.values()):
            self._check_text(name, value, options)
        tokens = {name: self._tokens(value, options) for name, value in texts.items()}
        names = [name for name, _ in self._template(pair is not None)] if add_special_tokens else texts
        return [token for name in names for token in tokens.get(name, [name])]

    def _tokens(self, text: str | list[str], options: Options) -> list[str]:
        words = options.is_split_into_words
        return [
            token
            for part in (text if words else [text])
            for token in self._split(self._prepare(part, words, options.add_prefix_space), options)
        ]

    def _split(self, text: str, options: Options) -> list[str]:
        """Splits at added tokens, then lets the model split the rest."""
        split = options.split_special_tokens
        if self.split_special_tokens if split is None else split:
            return self._tokenize(self._lower(text))
        # The first search finds added tokens that keep their case, the second one those that are in lower case.
        if self.do_lower_case:
            text = "".join(part if found else self._lower(part) for part, found in self._split_at_added(text))
        parts = self._split_at_added(text)
        for i, (part, found) in enumerate(parts):
            if not found:
                continue
            token = self._added[self._added_ids[part]]
            left, right = (parts[i - 1][0] if i else ""), (parts[i + 1][0] if i + 1 < len(parts) else "")
            if token.rstrip and right:
                parts[i + 1] = (right.lstrip(), parts[i + 1][1])
            if token.lstrip and left:
                parts[i - 1] = (left.rstrip(), parts[i - 1][1])
            if token.single_word:
                if left and not left.endswith(" ") and not parts[i - 1][1]:
                    parts[i - 1], parts[i] = (parts[i - 1][0] + part, False), ("", False)
                elif right and not right.startswith(" ") and not parts[i + 1][1]:
                    parts[i + 1], parts[i] = (part + parts[i + 1][0], False), ("", False)
        return [token for part, found in parts if part for token in ([part] if found else self._tokenize(part))]

    def _split_at_added(self, text: str) -> list[tuple[str, bool]]:
        """Splits a text at added tokens; returns the parts, and whether each is an added token."""
        parts = self._added_pattern.split(text)
        return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]

    def _lower(self, text: str) -> str:
        # str.lower of a whole word writes a final sigma (ς), which the models do not know.
        return "".join(map(str.lower, text)) if self.do_lower_case else text

    def _ids(self, text, options: Options) -> list[int]:
        """Returns the ids of a text, or of a list of tokens or ids, which ``encode_plus`` takes."""
        if isinstance(text, str) or options.is_split_into_words:
            return self.convert_tokens_to_ids(self._tokens(text, options))
        return list(text) if isinstance(text[0], int) else self.convert_tokens_to_ids(text)

    def _encode(self, examples: list[tuple], single: bool, options: Options) -> BatchEncoding:
        if options.return_offsets_mapping:
            raise NotImplementedError("return_offsets_mapping needs a fast tokenizer")
        ids = lambda text: None if text is None else self._ids(text, options)
        rows = [self._row(ids(first), ids(second), options) for first, second in examples]
        return self._finish(rows, options, single, prepend_batch_axis=single)

    def _decode(self, ids: list[int], skip_special_tokens: bool, spaces_between_special_tokens: bool) -> str:
        special = set(self.all_special_tokens)
        # convert_tokens_to_string must not get added tokens, except special ones of the model's own vocabulary.
        beyond = {token for token in self.additional_special_tokens if self._token_to_id(token) >= self.vocab_size}
        apart = (self._added_ids.keys() - special) | beyond
        tokens = [self._id_to_token(index) for index in ids]
        if None in tokens:
            raise ValueError(f"there is no token with id {ids[tokens.index(None)]}")
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in special]
        texts = []
        for added, run in groupby(tokens, apart.__contains__):
            run = list(run)
            texts += run if added else [self.convert_tokens_to_string(run)]
        texts = [*filter(None, texts[:-1]), *texts[-1:]]  # As in transformers, an empty text counts if it is the last.
        return (" " if spaces_between_special_tokens else "").join(texts)
