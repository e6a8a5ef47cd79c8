"""Tokenizers that find the added tokens themselves: ``SlowTokenizer``."""

import re
from abc import abstractmethod

from .base import TokenizerBase
from .batch_encoding import BatchEncoding
from .model_inputs import Options, make_options
from .special_tokens import AddedToken


class SlowTokenizer(TokenizerBase):
    """A tokenizer in Python.

    A subclass has ``_base_vocab``, ``_tokenize``, ``_base_token_to_id``, ``_base_id_to_token``, ``_prepare`` and
    ``convert_tokens_to_string``.
    """

    is_fast = False
    do_lower_case = False

    @property
    @abstractmethod
    def _base_vocab(self) -> dict[str, int]:
        """The ids of the model's own tokens."""

    @abstractmethod
    def _tokenize(self, text: str) -> list[str]:
        """The model's tokens of a text without added tokens."""

    @abstractmethod
    def _prepare(self, text: str, word: bool, add_prefix_space: bool | None) -> str:
        """A text (or a word of a text that comes in words) as it is tokenized."""

    @property
    def vocab_size(self) -> int:
        return len(self._base_vocab)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(sorted(self._added.items()))

    def get_vocab(self) -> dict[str, int]:
        return {**self._base_vocab, **self._added_ids}

    def __len__(self) -> int:
        return self.vocab_size + sum(token not in self._base_vocab for token in self._added_ids)

    def _add_first_tokens(self, decoder: dict[int, AddedToken]):
        self._added: dict[int, AddedToken] = dict(decoder)
        self._added_ids: dict[str, int] = {token.content: index for index, token in decoder.items()}
        self._add_tokens([token for token in self.all_special_tokens_extended if token.content not in self._added_ids])

    def _add_tokens(self, tokens: list[AddedToken]) -> int:
        before = count = len(self)
        for token in tokens:
            content = token.content
            if self.do_lower_case and token.normalized and not token.special:
                # Texts are in lower case where it is looked for.
                content = content.lower()
                token = AddedToken(
                    content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=True,
                )
            index = self._added_ids.get(content, self._base_vocab.get(content))
            if index is None:
                index, count = count, count + 1
            if token.special and content not in self.all_special_tokens:
                self._additional_special_tokens.append(token)
            self._added[index] = token
            self._added_ids[content] = index
        # Of two that begin at the same place the longer one counts.
        longest_first = sorted(filter(None, self._added_ids), key=len, reverse=True)
        self._added_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        return count - before

    def _token_to_id(self, token: str) -> int:
        index = self._added_ids.get(token, self._base_vocab.get(token))
        if index is None and self.unk_token is not None:
            return self._added_ids.get(self.unk_token, self._base_vocab.get(self.unk_token))
        return index

    def _id_to_token(self, index: int) -> str | None:
        return self._added[index].content if index in self._added else self._base_id_to_token(index)

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options) -> list[str]:
        """The tokens of a text (of two, one behind the other), as text.

        Args:
            add_special_tokens: with [CLS] and [SEP].
            options: is_split_into_words, split_special_tokens, add_prefix_space: see ``__call__``.
        """
        options = make_options(options)
        texts = [text] if pair is None else [text, pair]
        for name, value in zip(("text", "pair"), texts):
            self._check_text(name, value, options)
        tokens = [self._tokens(value, options) for value in texts]
        if not add_special_tokens:
            return [token for part in tokens for token in part]
        if pair is None:
            return [self.cls_token, *tokens[0], self.sep_token]
        texts = dict(zip(("$A", "$B"), tokens))
        return [token for name, _ in self._pair_parts() for token in texts.get(name, [name])]

    def _tokens(self, text: str | list[str], options: Options) -> list[str]:
        if options.is_split_into_words:
            return [
                token
                for word in text
                for token in self._split(self._prepare(word, True, options.add_prefix_space), options)
            ]
        return self._split(self._prepare(text, False, options.add_prefix_space), options)

    def _split(self, text: str, options: Options) -> list[str]:
        """Tokens of a text, added tokens first."""
        whole = options.split_special_tokens
        if self.split_special_tokens if whole is None else whole:
            return self._tokenize(self._lower(text))
        # Lower case first, where added tokens keep theirs: the normalized ones are in lower case themselves.
        if self.do_lower_case:
            text = "".join(part if found else self._lower(part) for part, found in self._parts(text))
        parts = list(self._parts(text))
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
        tokens = []
        for part, found in parts:
            if part:
                tokens += [part] if found else self._tokenize(part)
        return tokens

    def _parts(self, text: str):
        """Pieces of the text one after the other, and whether each is an added token."""
        end = 0
        for match in self._added_pattern.finditer(text):
            if match.start() > end:
                yield text[end : match.start()], False
            yield match.group(), True
            end = match.end()
        if end < len(text):
            yield text[end:], False

    def _lower(self, text: str) -> str:
        # Letter by letter: Greek's final sigma is one for str.lower, and none for the models.
        return "".join(map(str.lower, text)) if self.do_lower_case else text

    def _check_single(self, what: str, text, options: Options):
        if isinstance(text, list | tuple) and not options.is_split_into_words and len(text) > 0:
            if all(isinstance(item, str) for item in text) or all(isinstance(item, int) for item in text):
                return
        super()._check_single(what, text, options)

    def _ids(self, text, options: Options) -> list[int]:
        """Ids of a text; of a list of tokens or ids too, which ``encode_plus`` takes."""
        if isinstance(text, str) or options.is_split_into_words:
            return self.convert_tokens_to_ids(self._tokens(text, options))
        return list(text) if isinstance(text[0], int) else self.convert_tokens_to_ids(text)

    def _encode(self, examples: list[tuple], single: bool, options: Options) -> BatchEncoding:
        if options.return_offsets_mapping:
            raise NotImplementedError("return_offsets_mapping needs a fast tokenizer")
        rows = []
        for first, second in examples:
            row = self._row(self._ids(first, options), None if second is None else self._ids(second, options), options)
            if options.return_length:
                row["length"] = len(row["input_ids"])
            rows.append(row)
        if not single:
            return BatchEncoding(self._pad_rows(rows, options), tensor_type=options.return_tensors)
        row = self._pad_row(rows[0], options.padding, options.max_length, options)
        if options.return_length:
            row["length"] = len(row["input_ids"])
        return BatchEncoding(row, tensor_type=options.return_tensors, prepend_batch_axis=True)

    def _decode(self, ids: list[int], skip_special_tokens: bool, spaces_between_special_tokens: bool) -> str:
        special = set(self.all_special_tokens)
        # Special tokens of the vocabulary itself are left to convert_tokens_to_string; those behind it are not.
        behind = {token for token in self.additional_special_tokens if self._token_to_id(token) >= self.vocab_size}
        apart = (self._added_ids.keys() - special) | behind
        texts, current = [], []

        def flush(even_if_empty: bool):
            if current:
                text = self.convert_tokens_to_string(current)
                if text or even_if_empty:
                    texts.append(text)
                current.clear()

        for index in ids:
            token = self._id_to_token(index)
            if token is None:
                raise ValueError(f"there is no token with id {index}")
            if skip_special_tokens and token in special:
                continue
            if token in apart:
                flush(even_if_empty=False)
                texts.append(token)
            else:
                current.append(token)
        flush(even_if_empty=True)
        return (" " if spaces_between_special_tokens else "").join(texts)
