"""``AddedToken``, a token that is never split, and ``SpecialTokens``, the special tokens of a tokenizer by name."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before the model splits the rest.

    Args:
        content: the text.
        single_word: the token is not found within a longer word.
        lstrip, rstrip: the token includes the white space on its left (right).
        normalized: the token is searched for in the normalized text instead of the original; None: ``not special``.
        special: ``decode(skip_special_tokens=True)`` omits the token.
    """

    content: str
    _: KW_ONLY
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def __post_init__(self):
        if self.normalized is None:
            object.__setattr__(self, "normalized", not self.special)

    def __str__(self) -> str:
        return self.content


def as_added_token(token, **flags) -> AddedToken:
    """Converts a token to an ``AddedToken``.

    Args:
        token: text, which gets ``flags``; a dict, as in the files of a tokenizer; an ``AddedToken`` of this package or
            of tokenizers. Others raise TypeError.
    """
    if isinstance(token, AddedToken):
        return token
    if isinstance(token, str):
        return AddedToken(token, **flags)
    names = AddedToken.__dataclass_fields__
    if isinstance(token, Mapping) and "content" in token:
        return AddedToken(**{name: token[name] for name in names if name in token})
    if all(hasattr(token, name) for name in names):
        return AddedToken(**{name: getattr(token, name) for name in names})
    raise TypeError(f"expected a token as text or AddedToken, got {type(token).__name__}: {token!r}")


def _token(name: str) -> property:
    def get(self) -> str | None:
        token = self._special_tokens[name]
        return None if token is None else token.content

    def set(self, token):
        self._special_tokens[name] = None if token is None else as_added_token(token, special=True)

    return property(get, set, doc=f"Text of the {name[:-6]} token, or None. Setting it adds nothing to the vocabulary.")


def _token_id(name: str) -> property:
    def get(self) -> int | None:
        return self.convert_tokens_to_ids(getattr(self, name))

    def set(self, index: int | None):
        setattr(self, name, None if index is None else self.convert_ids_to_tokens(index))

    return property(get, set, doc=f"Id of the {name[:-6]} token, or None if there is no such token.")


class SpecialTokens:
    """The special tokens of a tokenizer, by name and together.

    A subclass has ``convert_tokens_to_ids``, ``convert_ids_to_tokens`` and ``_add_tokens(tokens) -> int``.
    """

    _special_tokens: dict[str, AddedToken | None]
    _additional_special_tokens: list[AddedToken]

    bos_token, bos_token_id = _token("bos_token"), _token_id("bos_token")
    eos_token, eos_token_id = _token("eos_token"), _token_id("eos_token")
    unk_token, unk_token_id = _token("unk_token"), _token_id("unk_token")
    sep_token, sep_token_id = _token("sep_token"), _token_id("sep_token")
    pad_token, pad_token_id = _token("pad_token"), _token_id("pad_token")
    cls_token, cls_token_id = _token("cls_token"), _token_id("cls_token")
    mask_token, mask_token_id = _token("mask_token"), _token_id("mask_token")
    pad_token_type_id = 0

    @property
    def additional_special_tokens(self) -> list[str]:
        """The special tokens without a name of their own."""
        return [token.content for token in self._additional_special_tokens]

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence | None):
        self._additional_special_tokens = _as_special(tokens or ())

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.additional_special_tokens)

    @additional_special_tokens_ids.setter
    def additional_special_tokens_ids(self, ids: Sequence[int]):
        self.additional_special_tokens = self.convert_ids_to_tokens(ids)

    @property
    def special_tokens_map_extended(self) -> dict[str, AddedToken | list[AddedToken]]:
        """The special tokens that are set, by name."""
        tokens = {name: token for name, token in self._special_tokens.items() if token is not None}
        if self._additional_special_tokens:
            tokens["additional_special_tokens"] = list(self._additional_special_tokens)
        return tokens

    @property
    def special_tokens_map(self) -> dict[str, str | list[str]]:
        """The texts of the special tokens that are set, by name."""
        return {name: getattr(self, name) for name in self.special_tokens_map_extended}

    @property
    def all_special_tokens_extended(self) -> list[AddedToken]:
        """All special tokens, each once."""
        first = {}
        for token in filter(None, [*self._special_tokens.values(), *self._additional_special_tokens]):
            first.setdefault(token.content, token)
        return list(first.values())

    @property
    def all_special_tokens(self) -> list[str]:
        """The texts of all special tokens, each once."""
        return [token.content for token in self.all_special_tokens_extended]

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def add_special_tokens(self, special_tokens_dict: Mapping, replace_additional_special_tokens: bool = True) -> int:
        """Names special tokens, and adds those that the vocabulary lacks; see ``add_tokens``.

        Args:
            special_tokens_dict: tokens by name ("pad_token", ...); a list of them for "additional_special_tokens".
                Another name raises ValueError.
            replace_additional_special_tokens: the earlier additional tokens are no longer special.
        """
        tokens = []
        for name, value in special_tokens_dict.items():
            if name in NAMES:
                tokens.append(as_added_token(value, special=True))
                setattr(self, name, tokens[-1])
            elif name == "additional_special_tokens":
                new = _as_special(value)
                if not replace_additional_special_tokens:
                    new = [token for token in new if token.content not in self.additional_special_tokens]
                    self._additional_special_tokens += new
                elif new:
                    self._additional_special_tokens = new
                tokens += new
            else:
                raise ValueError(f"expected {', '.join(NAMES)} or additional_special_tokens, got {name!r}")
        return self.add_tokens(tokens, special_tokens=True)

    def add_tokens(self, new_tokens, special_tokens: bool = False) -> int:
        """Adds tokens with the next ids. Tokens that the vocabulary already has keep theirs, and are no longer split.

        Returns the number of new ids; a model needs embeddings of ``len(tokenizer)`` rows.

        Args:
            new_tokens: text or ``AddedToken``, one or a list of them. Others raise TypeError.
            special_tokens: the tokens are special.
        """
        if not isinstance(new_tokens, list | tuple):
            new_tokens = [new_tokens] if new_tokens else []
        tokens = [as_added_token(token, special=special_tokens) for token in new_tokens]
        if special_tokens:
            tokens = [replace(token, special=True) for token in tokens]
        return self._add_tokens([token for token in tokens if token.content])


def _as_special(tokens) -> list[AddedToken]:
    if not isinstance(tokens, list | tuple):
        raise TypeError(f"expected a list of tokens, got {type(tokens).__name__}")
    return [as_added_token(token, special=True) for token in tokens]
