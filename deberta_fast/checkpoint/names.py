"""Names and layouts of a file's tensors as those of this package's models, and back as Hugging Face's.

The package calls everything as Hugging Face's DeBERTa-v2 does, v1 too, with one head for masked language models:
``lm_predictions.lm_head``.
"""

import torch

from .error import CheckpointError
from .prefixes import without_prefixes
from .tf import from_keras

_HEAD = "lm_predictions.lm_head."
_WORDS = "deberta.embeddings.word_embeddings."
_POSITIONS = "deberta.embeddings.position_embeddings."
# What v1 (in TensorFlow v2 as well) calls what has another name here.
_ATTENTION = {
    "attention.self.q_bias": "attention.self.query_proj.bias",
    "attention.self.v_bias": "attention.self.value_proj.bias",
    "attention.self.pos_proj.": "attention.self.pos_key_proj.",
    "attention.self.pos_q_proj.": "attention.self.pos_query_proj.",
}
_LEGACY_HEAD = {"cls.predictions.transform.": _HEAD, "cls.predictions.": _HEAD}
_LAYER_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_QUERY, _KEY, _VALUE = (f"attention.self.{x}_proj.weight" for x in ("query", "key", "value"))
_IN = "attention.self.in_proj.weight"

_Found = dict[str, tuple[str, torch.Tensor]]  # by the package's name: the file's name, the tensor


def to_native(
    tensors: dict[str, torch.Tensor], *, version: int, heads: int, expected: set[str], part: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A file's tensors under the names of the model that is being loaded.

    Args:
        tensors: by the names of the file, which may be Hugging Face's, Microsoft's or Keras's. Left as they are; what
            is returned may share their memory.
        version: 1 or 2 (v3 counts as 2), of the model.
        heads: attention heads, by which v1 interleaves its projections.
        expected: the model's own names; those of a bare model have no "deberta." before them.
        part: "discriminator" or "generator", which of the two to take of a file of pretraining that holds both.

    Returns:
        The tensors, unknown ones among them, and the file's names of known ones that this model has no use for: other
        models' heads, the other part, position embeddings that it does not add.

    Raises:
        CheckpointError: the tensors do not say what the model's weights are.
    """
    bare = not any(x.startswith("deberta.") for x in expected)
    wanted = {"deberta." + x for x in expected} if bare else expected
    found, other, ignored = _found(tensors, wanted, part)
    ignored += _add_differences(found, other, wanted)
    if version == 1:
        ignored += _drop_zero_biases(found)
    _split_projections(found, version, heads)
    _settle_decoder(found, wanted)
    native = {}
    for name, (origin, tensor) in found.items():
        if name not in wanted and _is_of_other_models(name, wanted):
            ignored.append(origin)
        else:
            native[name.removeprefix("deberta.") if bare else name] = tensor
    return native, ignored


def _found(tensors: dict[str, torch.Tensor], wanted: set[str], part: str) -> tuple[_Found, _Found, list[str]]:
    """Own tensors, those of the other part, and the file's names of the latter and of what is there twice."""
    translated = [from_keras(name, tensor) for name, tensor in tensors.items()]
    names, of_other = without_prefixes([name for name, _ in translated], part)
    found: tuple[_Found, _Found] = {}, {}
    ignored = [origin for origin, is_other in zip(tensors, of_other) if is_other]
    for origin, name, (_, tensor), is_other in zip(tensors, names, translated, of_other):
        name = _replaced(name, _ATTENTION | _LEGACY_HEAD | _LAYER_NORM)
        first, _ = found[is_other].setdefault(name, (origin, tensor))
        if first == origin or is_other:
            continue
        if name in wanted and not torch.equal(tensor, found[False][name][1]):
            raise CheckpointError(f"{first} and {origin} both stand for {name}, and differ")
        ignored.append(origin)
    return *found, ignored


def _replaced(name: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        name = name.replace(old, new)
    return name


def _add_differences(found: _Found, other: _Found, wanted: set[str]) -> list[str]:
    """E_D = E_G + E_delta: a discriminator trained beside a generator may keep the difference of its embeddings only.

    With the sum there as well, the difference is but left over. Returns the names of those.
    """
    left_over = []
    for table in (_WORDS, _POSITIONS):
        origin, difference = found.pop(table + "_weight", (None, None))
        if origin is None:
            continue
        if table + "weight" in found or table + "weight" not in wanted:
            left_over.append(origin)
            continue
        generator_name, generator = other.get(table + "weight", (None, None))
        if generator is None:
            raise CheckpointError(
                f"{origin} is what the discriminator's embeddings add to its generator's, which are not in the file. "
                "Join the two: the generator's tensors, often in pytorch_model.generator.bin, under names that begin "
                "with 'generator.', and the discriminator's with 'discriminator.'"
            )
        if generator.shape != difference.shape:
            raise CheckpointError(
                f"{origin} {tuple(difference.shape)} is to be added to {generator_name} {tuple(generator.shape)}"
            )
        found[table + "weight"] = origin, generator + difference
    return left_over


def _drop_zero_biases(found: _Found) -> list[str]:
    """Microsoft's code gives v1's keys, which have no biases, biases of zero. Returns the names of those."""
    zero = [
        name
        for name, (_, tensor) in found.items()
        if name.endswith(("attention.self.key_proj.bias", "attention.self.pos_key_proj.bias")) and not tensor.any()
    ]
    return [found.pop(name)[0] for name in zero]


def _split_projections(found: _Found, version: int, heads: int) -> None:
    """v1's in_proj [3 * H, H], its rows by head and there by query, key and value."""
    for name in [x for x in found if x.endswith(_IN)]:
        origin, tensor = found.pop(name)
        if version != 1:
            raise CheckpointError(f"{origin} belongs to DeBERTa v1; the configuration says v2 or v3")
        if tensor.dim() != 2 or tensor.shape[0] % (3 * heads):
            raise CheckpointError(f"{origin} {tuple(tensor.shape)} must hold 3 projections for each of {heads} heads")
        parts = tensor.unflatten(0, (heads, 3, -1)).unbind(1)
        for ending, projection in zip((_QUERY, _KEY, _VALUE), parts):
            found[name.removesuffix(_IN) + ending] = origin, projection.flatten(0, 1)


def _settle_decoder(found: _Found, wanted: set[str]) -> None:
    """The decoder of Hugging Face's head: a matrix that may be the word embeddings, and a second name of the bias."""
    weight, bias = _HEAD + "decoder.weight", _HEAD + "decoder.bias"
    if bias in found:  # the one that is added, should both be there and differ
        found[_HEAD + "bias"] = found.pop(bias)
    if weight not in found or weight in wanted:
        return
    origin, decoder = found[weight]
    # Whoever leaves out one of two tied tensors may have left out the embeddings.
    words_origin, words = found.setdefault(_WORDS + "weight", (origin, decoder))
    has_head = _HEAD + "bias" in wanted
    if has_head or words_origin == origin:
        del found[weight]
    if has_head and not torch.equal(decoder, words):
        raise CheckpointError(
            f"{origin} differs from {words_origin}, and the configuration ties them; "
            "if both were trained, set tie_word_embeddings to False"
        )


def _is_of_other_models(name: str, wanted: set[str]) -> bool:
    """A head that this model lacks altogether, or position embeddings that it does not add."""
    root = name.split(".", 1)[0] + "."
    if root in ("lm_predictions.", "mask_predictions.", "pooler.", "classifier.", "qa_outputs."):
        return not any(x.startswith(root) for x in wanted)
    return name in (_POSITIONS + "weight", "deberta.embeddings.position_ids")


def to_hf(tensors: dict[str, torch.Tensor], *, version: int, heads: int, legacy: bool) -> dict[str, torch.Tensor]:
    """The package's tensors under the names and in the layouts that Hugging Face's models load.

    Args:
        tensors: of a whole model, by the package's names.
        version: 1 or 2 (v3 counts as 2).
        heads: attention heads.
        legacy: the configuration's ``legacy``: the head for masked language models is ``cls.predictions``, and not
            ``lm_predictions.lm_head``.

    Raises:
        ValueError: a decoder of its own, which the head of ``legacy=False`` cannot have; or in v1 a projection without
            the other two.
    """
    if not legacy and _HEAD + "decoder.weight" in tensors:
        raise ValueError(
            "a decoder that is not tied to the word embeddings can be saved with legacy=True only: "
            "Hugging Face's other head has none"
        )
    names = {_HEAD + x: "cls.predictions." + x for x in ("bias", "decoder.weight")} if legacy else {}
    names |= {_HEAD: "cls.predictions.transform."} if legacy else {}
    names |= {ours: theirs for theirs, ours in _ATTENTION.items()} if version == 1 else {}
    renamed = {}
    for name, tensor in tensors.items():
        if version == 1 and name.endswith((_QUERY, _KEY, _VALUE)):
            layer = name[: name.index("attention.self.")]
            if layer + _IN not in renamed:
                renamed[layer + _IN] = _joined(tensors, layer, heads)
        else:
            renamed[_replaced(name, names)] = tensor
    if legacy and _HEAD + "decoder.weight" in tensors:
        # Hugging Face 5 has two biases then, and adds this one.
        renamed["cls.predictions.decoder.bias"] = tensors[_HEAD + "bias"].clone()
    return renamed


def _joined(tensors: dict[str, torch.Tensor], layer: str, heads: int) -> torch.Tensor:
    """The inverse of ``_split_projections``, for one layer."""
    parts = [tensors.get(layer + x) for x in (_QUERY, _KEY, _VALUE)]
    if any(x is None for x in parts):
        raise ValueError(f"{layer}attention.self needs query_proj, key_proj and value_proj, which v1 saves as one")
    return torch.stack([x.unflatten(0, (heads, -1)) for x in parts], 1).flatten(0, 2)
