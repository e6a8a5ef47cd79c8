"""Names and layouts of checkpoints: Hugging Face's, Microsoft's, Keras's, and those that wrappers change."""

import pytest
import torch
from checkpoint_files import HEADS, LEGACY, WIDTH, as_keras, as_v1, native, native_shapes, renamed, write_keras

from deberta_fast.checkpoint import CheckpointError, read_tensors, to_hf, to_native
from deberta_fast.checkpoint.hub import Source

WORDS, POSITIONS = (f"deberta.embeddings.{x}_embeddings." for x in ("word", "position"))
DECODER = "lm_predictions.lm_head.decoder.weight"


def load(tensors, version=2, head="", *, part="discriminator", expected=None, **options):
    expected = set(native_shapes(version, head, **options) if expected is None else expected)
    before = dict(tensors)
    result = to_native(tensors, version=version, heads=HEADS, expected=expected, part=part)
    assert tensors.keys() == before.keys() and all(tensors[x] is before[x] for x in before)
    return result


def assert_loads(tensors, expected, version=2, ignored=(), part="discriminator"):
    got, known = load(tensors, version, expected=expected, part=part)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert sorted(known) == sorted(ignored)


def prefixed(prefix, tensors):
    return {prefix + name: x for name, x in tensors.items()}


OPTIONS = {
    "small": dict(),
    "all": dict(embedding=6, conv=True, positions=True, types=2, norm=True),
    "mlm": dict(head="mlm"),
    "mlm-narrow": dict(head="mlm", embedding=6, positions=True),
    "mlm-untied": dict(head="mlm", tied=False),
    "cls": dict(head="cls", types=2),
    "qa": dict(head="qa", norm=True, conv=True),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_hugging_face(name, version):
    tensors = native(version, **OPTIONS[name])
    file = as_v1(tensors) if version == 1 else tensors
    if "decoder" not in str(tensors.keys()):
        assert_loads(file, tensors, version)
        back = to_hf(tensors, version=version, heads=HEADS, legacy=False)
        assert back.keys() == file.keys() and all(torch.equal(back[x], file[x]) for x in file)
    legacy = renamed(file, LEGACY)
    assert_loads(legacy, tensors, version)
    back = to_hf(tensors, version=version, heads=HEADS, legacy=True)
    if "decoder" in str(tensors.keys()):
        bias = back.pop("cls.predictions.decoder.bias")
        assert torch.equal(bias, legacy["cls.predictions.bias"])
        assert bias.data_ptr() != back["cls.predictions.bias"].data_ptr()
    assert back.keys() == legacy.keys() and all(torch.equal(back[x], legacy[x]) for x in legacy)


def test_v1_rows_are_interleaved_by_head():
    """The rows of in_proj, numbered: each of the two heads has 4 of the query, 4 of the key and 4 of the value."""
    name = "encoder.layer.0.attention.self."
    numbers = torch.arange(3 * WIDTH).float()[:, None].expand(-1, WIDTH)
    got, _ = load({"embeddings.LayerNorm.weight": torch.ones(1), name + "in_proj.weight": numbers}, 1)
    for kind, rows in (("query", [0, 1, 2, 3, 12, 13, 14, 15]), ("key", [4, 5, 6, 7, 16, 17, 18, 19])):
        assert got[f"{name}{kind}_proj.weight"][:, 0].tolist() == rows
    assert got[name + "value_proj.weight"][:, 3].tolist() == [8, 9, 10, 11, 20, 21, 22, 23]
    back = to_hf({x: y for x, y in got.items() if "proj" in x}, version=1, heads=HEADS, legacy=True)
    assert back.keys() == {name + "in_proj.weight"} and torch.equal(back[name + "in_proj.weight"], numbers)


def test_talking_heads():
    tensors = native(1) | {
        f"encoder.layer.0.attention.self.head_{x}_proj.weight": torch.randn(2, 2) for x in ("logits", "weights")
    }
    assert_loads(as_v1(tensors), tensors, 1)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["small", "mlm", "cls"])
@pytest.mark.parametrize("file", ["", "mlm", "cls"])
def test_a_file_of_another_model(name, file, version):
    """A model loads the body from a file of another task or of a bare model.

    The head in the file is recognised and ignored, and the model's own head is missing.
    """
    wanted = native(version, seed=1, **OPTIONS[name])
    tensors = native(version, file)
    got, ignored = load(as_v1(tensors) if version == 1 else tensors, version, expected=wanted)
    plain = {x.removeprefix("deberta."): y for x, y in tensors.items()}
    common = {x for x in wanted if x.removeprefix("deberta.") in plain}
    assert got.keys() == common
    assert all(torch.equal(got[x], plain[x.removeprefix("deberta.")]) for x in common)
    assert set(ignored) == {x for x in tensors if not x.startswith("deberta.") and x not in wanted and file}


@pytest.mark.parametrize(
    "prefix",
    ["bert.", "module.deberta.", "module.bert.", "_orig_mod.deberta.", "_orig_mod.module.deberta.", "model.deberta.",
     "base_model.model.deberta.", "deberta._orig_mod.", "module.", "", "encoder."],
)  # fmt: skip
@pytest.mark.parametrize("name", ["small", "cls", "mlm"])
def test_prefixes(prefix, name):
    """The body may have any name; the prefix of a wrapper is on the names of the heads too."""
    expected = native(**OPTIONS[name])
    around = prefix.removesuffix("deberta.").removesuffix("bert.") if prefix.endswith("bert.") or "a." in prefix else ""
    around = "module." if prefix == "module." else around if "deberta._" not in prefix else ""
    tensors = {}
    for x, tensor in expected.items():
        body = x.removeprefix("deberta.")
        tensors[prefix + body if body != x or name == "small" else around + x] = tensor
    assert_loads(tensors, expected)


def test_wrappers_inside_names():
    expected = native(head="cls")
    wrappers = [
        ("encoder.layer.0.", "encoder.layer.0._checkpoint_wrapped_module."),
        ("encoder.layer.1.", "_fsdp_wrapped_module.encoder.layer.1._orig_mod."),
        ("pooler.", "module.pooler._orig_mod."),
    ]
    assert_loads(renamed(expected, wrappers), expected)


def test_gamma_and_beta():
    expected = native(head="mlm", norm=True)
    gamma = [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]
    assert_loads(renamed(expected, gamma), expected)


def test_unknown_names_stay():
    extra = {"deberta.encoder.layer.0.attention.self.lora": torch.ones(1), "rank_head.weight": torch.ones(1)}
    extra |= {
        "cls.seq_relationship.weight": torch.ones(1),
        "deberta.embeddings.token_type_embeddings.weight": torch.ones(2),
    }
    got, ignored = load(native(head="cls") | extra, head="cls")
    assert got.keys() == native_shapes(head="cls").keys() | extra.keys() and not ignored
    got, _ = load(native(head="cls") | {"classifier.extra": torch.ones(1)}, head="cls")
    assert "classifier.extra" in got  # a part of its own head
    got, _ = load(native() | {"encoder.extra": torch.ones(1)})
    assert "encoder.extra" in got
    got, _ = load({"fc.weight": torch.ones(1)})
    assert got.keys() == {"fc.weight"}


def test_buffers_and_position_embeddings():
    expected = native(head="cls")
    known = {"deberta.embeddings.position_ids": torch.arange(3), POSITIONS + "weight": torch.ones(16, WIDTH)}
    assert_loads(expected | known, expected, ignored=known)
    assert_loads(
        expected | known, expected | {POSITIONS + "weight": known[POSITIONS + "weight"]}, ignored=list(known)[:1]
    )
    bare = native()
    known = {x.removeprefix("deberta."): y for x, y in known.items()}
    assert_loads(bare | known, bare, ignored=known)


def test_layouts_of_the_other_version_are_named():
    with pytest.raises(CheckpointError, match=r"layer.0.attention.self.in_proj.weight belongs to DeBERTa v1"):
        load(as_v1(native(1)), 2)
    with pytest.raises(CheckpointError, match=r"in_proj.weight \(24, 8\) must hold 3 projections for each of 5 heads"):
        to_native(as_v1(native(1)), version=1, heads=5, expected=set(native_shapes(1)), part="discriminator")
    with pytest.raises(CheckpointError, match=r"in_proj.weight \(3,\) must hold"):
        load(
            {
                "encoder.layer.0.attention.self.in_proj.weight": torch.ones(3),
                "embeddings.LayerNorm.bias": torch.ones(1),
            },
            1,
        )


# Microsoft's


def test_v1_saved_by_microsofts_code():
    """Microsoft's code splits in_proj and saves biases of zero for the keys; v1 has no place for trained ones."""
    expected = native(1, "cls")
    names = [f"deberta.encoder.layer.{i}.attention.self.{x}_proj.bias" for i in (0, 1) for x in ("key", "pos_key")]
    assert_loads(expected | {x: torch.zeros(WIDTH) for x in names}, expected, 1, ignored=names)
    got, ignored = load(expected | {x: torch.ones(WIDTH) for x in names}, 1, expected=expected)
    assert got.keys() == expected.keys() | set(names) and not ignored
    v2 = native(2, "cls") | {x: torch.zeros(WIDTH) for x in names}
    assert_loads(v2, v2)  # v2 has these biases


def test_v3_with_the_discriminators_head():
    expected = native(head="mlm", norm=True)
    known = {f"mask_predictions.{x}": torch.ones(1) for x in ("dense.weight", "LayerNorm.bias", "classifier.weight")}
    assert_loads(expected | known, expected, ignored=known)


def test_a_difference_beside_the_sum_is_left_over():
    expected = native(head="cls", positions=True)
    known = {x + "_weight": torch.full_like(expected[x + "weight"], 9.0) for x in (WORDS, POSITIONS)}
    assert_loads(expected | known, expected, ignored=known)


def pair(positions=True):
    """A generator with its head, and a discriminator, whose tensors have other values."""
    return native(head="mlm", positions=positions, seed=1), native(head="cls", positions=positions, seed=2)


@pytest.mark.parametrize("around", ["", "module.", "model."])
def test_a_pair_in_one_file(around):
    generator, discriminator = pair()
    first, second = prefixed(around + "generator.", generator), prefixed(around + "discriminator.", discriminator)
    assert_loads(first | second, generator, part="generator", ignored=second)
    assert_loads(second | first, discriminator, part="discriminator", ignored=first)
    bare = {x.removeprefix("deberta."): y for x, y in discriminator.items() if x.startswith("deberta.")}
    heads = [x for x in second if "deberta." not in x]
    assert_loads(first | second, bare, ignored=[*first, *heads])
    with_more = first | second | {"optimizer_state": torch.ones(1)}
    assert "optimizer_state" in load(with_more, expected=discriminator)[0]


def test_a_pair_of_bare_models():
    generator, discriminator = native(seed=1), native(seed=2)
    first, second = prefixed("generator.", generator), prefixed("discriminator.", discriminator)
    assert_loads(first | second, generator, part="generator", ignored=second)
    assert_loads(first | second, discriminator, ignored=first)


def as_difference(discriminator, generator, tables=(WORDS, POSITIONS)):
    discriminator = dict(discriminator)
    for x in tables:
        discriminator[x + "_weight"] = discriminator.pop(x + "weight") - generator[x + "weight"]
    return discriminator


def test_differences_are_added_to_the_generators_embeddings():
    generator, discriminator = pair()
    second = prefixed("discriminator.", as_difference(discriminator, generator))
    first = prefixed("generator.", generator)
    got, ignored = load(first | second, expected=discriminator)
    assert got.keys() == discriminator.keys() and sorted(ignored) == sorted(first)
    for name, tensor in discriminator.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)
    assert_loads(first | second, generator, part="generator", ignored=second)
    without = set(discriminator) - {POSITIONS + "weight"}  # this model does not use the positions' difference
    got, ignored = load(first | second, expected=without)
    assert got.keys() == without and "discriminator." + POSITIONS + "_weight" in ignored


def test_differences_without_the_generator():
    generator, discriminator = pair()
    alone = as_difference(discriminator, generator)
    for file in (alone, prefixed("discriminator.", alone)):
        with pytest.raises(
            CheckpointError, match=r"word_embeddings\._weight .*pytorch_model\.generator\.bin"
        ) as raised:
            load(file, expected=discriminator)
        assert next(x for x in file if WORDS + "_weight" in x) in str(raised.value)
    # Only a model that adds positions needs the positions' difference.
    alone = as_difference(discriminator, generator, (POSITIONS,))
    with pytest.raises(CheckpointError, match=r"position_embeddings\._weight is what"):
        load(alone, expected=discriminator)
    got, ignored = load(alone, expected=set(discriminator) - {POSITIONS + "weight"})
    assert ignored == [POSITIONS + "_weight"] and POSITIONS + "_weight" not in got
    narrow = native(head="mlm", embedding=6, positions=True)
    file = prefixed("generator.", narrow) | prefixed("discriminator.", as_difference(discriminator, generator))
    with pytest.raises(CheckpointError, match=r"_weight \(20, 8\) is to be added to generator\..* \(20, 6\)"):
        load(file, expected=discriminator)


def test_the_part_that_is_not_there():
    for part, other in (("generator", "discriminator"), ("discriminator", "generator")):
        with pytest.raises(
            CheckpointError, match=rf"holds a {other} \({other}\.deberta\.\*\), and the {part} was asked"
        ):
            load(prefixed(other + ".", native(head="cls")), head="cls", part=part)
    with pytest.raises(ValueError, match="part must be 'discriminator' or 'generator', got 'both'"):
        load(native(), part="both")


def test_several_models_in_a_file():
    with pytest.raises(CheckpointError, match=r"several models: context\.\*, question\.\*"):
        load(prefixed("question.", native()) | prefixed("context.", native()))


# Heads of masked language models


def test_tied_decoders():
    expected = native(head="mlm")
    words, bias = expected[WORDS + "weight"], expected["lm_predictions.lm_head.bias"]
    legacy = renamed(expected, LEGACY)
    full = legacy | {"cls.predictions.decoder.weight": words.clone(), "cls.predictions.decoder.bias": bias.clone()}
    assert_loads(full, expected)
    assert_loads(expected | {DECODER: words}, expected)
    differs = full | {"cls.predictions.decoder.weight": words + 1e-3}
    message = r"cls\.predictions\.decoder\.weight differs from deberta\.embeddings\.word.*tie_word_embeddings to False"
    with pytest.raises(CheckpointError, match=message):
        load(differs, expected=expected)
    with pytest.raises(CheckpointError, match="differs"):
        load(full | {"cls.predictions.decoder.weight": words[1:]}, expected=expected)
    cls = native(head="cls")  # a model that does not use the decoder
    got, ignored = load(differs, expected=cls)
    assert got.keys() == {x for x in cls if x.startswith("deberta.")}
    assert "cls.predictions.decoder.weight" in ignored
    half = full | {"cls.predictions.decoder.weight": words.half(), WORDS + "weight": words.half().float()}
    assert torch.equal(load(half, expected=expected)[0][WORDS + "weight"], words.half().float())


def test_a_decoder_may_stand_for_the_embeddings():
    """Some savers keep only that one of two tied tensors whose name comes first."""
    expected = native(head="mlm")
    legacy = renamed(expected, LEGACY)
    legacy["cls.predictions.decoder.weight"] = legacy.pop(WORDS + "weight")
    assert_loads(legacy, expected)
    got, ignored = load(legacy, expected=native_shapes(head="cls"))
    assert torch.equal(got[WORDS + "weight"], expected[WORDS + "weight"])
    assert "cls.predictions.decoder.weight" not in ignored


def test_a_decoder_of_its_own():
    expected = native(head="mlm", tied=False)
    legacy = renamed(expected, LEGACY)
    assert_loads(legacy, expected)
    # transformers 5 then leaves cls.predictions.bias at zero and adds the decoder's bias.
    bias = legacy["cls.predictions.bias"]
    assert_loads(legacy | {"cls.predictions.decoder.bias": bias, "cls.predictions.bias": torch.zeros(20)}, expected)
    assert_loads({"cls.predictions.decoder.bias": bias} | legacy | {"cls.predictions.bias": torch.zeros(20)}, expected)
    with pytest.raises(ValueError, match="legacy=True only"):
        to_hf(expected, version=2, heads=HEADS, legacy=False)
    tied = native(head="mlm")
    assert load(tied, expected=expected)[0].keys() == tied.keys()  # the caller sees that the decoder is missing


def test_two_heads_in_a_file():
    expected, other = native(head="mlm"), renamed(native(head="mlm", seed=5), LEGACY)
    other = {x: y for x, y in other.items() if x.startswith("cls.")}
    with pytest.raises(CheckpointError, match=r"lm_predictions\.lm_head\..* and cls\..* both stand for lm_pred"):
        load(expected | other, expected=expected)
    same = {x: y for x, y in renamed(expected, LEGACY).items() if x.startswith("cls.")}
    assert_loads(expected | same, expected, ignored=same)
    cls = native(head="cls")
    body = {x: y for x, y in expected.items() if x.startswith("deberta.")}
    got, ignored = load(expected | other, expected=cls)
    assert got.keys() == body.keys() and set(ignored) == (expected | other).keys() - body.keys()


# Keras's


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["small", "all", "mlm", "mlm-narrow", "cls", "qa"])
def test_keras(tmp_path, name, version):
    pytest.importorskip("h5py")
    expected = native(version, **OPTIONS[name])
    write_keras(tmp_path / "tf_model.h5", as_keras(as_v1(expected) if version == 1 else expected))
    tensors, file = read_tensors(Source(tmp_path))
    assert file == "tf_model.h5" and all("/" in x for x in tensors)
    assert_loads(tensors, expected, version)
    # TensorFlow's safetensors files and shards omit the model's name.
    assert_loads({x.split("/", 1)[1]: y for x, y in tensors.items()}, expected, version)


def test_keras_names():
    """TensorFlow's names become PyTorch's, and kernels are transposed."""
    file = "tf_deberta_v2_for_masked_lm/"
    names = {
        "deberta/embeddings/word_embeddings/weight:0": "deberta.embeddings.word_embeddings.weight",
        "deberta/embeddings/token_type_embeddings/embeddings:0": "deberta.embeddings.token_type_embeddings.weight",
        "deberta/embeddings/position_embeddings/embeddings:0": "deberta.embeddings.position_embeddings.weight",
        "deberta/embeddings/LayerNorm/gamma:0": "deberta.embeddings.LayerNorm.weight",
        "deberta/embeddings/embed_proj/kernel:0": "deberta.embeddings.embed_proj.weight",
        "deberta/encoder/layer_._11/attention/self/q_bias:0": "deberta.encoder.layer.11.attention.self.query_proj.bias",
        "deberta/encoder/layer_._11/output/LayerNorm/beta:0": "deberta.encoder.layer.11.output.LayerNorm.bias",
        "deberta/encoder/layer_._0/attention/self/pos_q_proj/kernel:0":
            "deberta.encoder.layer.0.attention.self.pos_query_proj.weight",
        "deberta/encoder/rel_embeddings.weight:0": "deberta.encoder.rel_embeddings.weight",
        "deberta/encoder/conv/conv/kernel:0": "deberta.encoder.conv.conv.weight",
        "cls/predictions/transform/dense/kernel:0": "lm_predictions.lm_head.dense.weight",
        "cls/predictions/bias:0": "lm_predictions.lm_head.bias",
    }  # fmt: skip
    shapes = [(3, 5, 7) if "conv/kernel" in x else (3, 5) for x in names]
    tensors = {file + x: torch.randn(shape) for x, shape in zip(names, shapes)}
    got, _ = load(tensors, expected=set(names.values()))
    assert got.keys() == set(names.values())
    for x, name in names.items():
        kernel = tensors[file + x].permute(*reversed(range(tensors[file + x].dim())))
        assert torch.equal(got[name], kernel if "kernel" in x else tensors[file + x]), name


# Saving


def test_a_projection_without_the_others():
    for missing in ("query", "key", "value"):
        tensors = native(1)
        del tensors[f"encoder.layer.1.attention.self.{missing}_proj.weight"]
        with pytest.raises(ValueError, match=r"encoder\.layer\.1\.attention\.self needs query_proj, key_proj and"):
            to_hf(tensors, version=1, heads=HEADS, legacy=True)


def test_saving_leaves_the_rest_alone():
    tensors = {"mask_predictions.dense.weight": torch.ones(1), "my_head.bias": torch.ones(1)}
    for version in (1, 2):
        assert to_hf(tensors, version=version, heads=HEADS, legacy=True) == tensors
