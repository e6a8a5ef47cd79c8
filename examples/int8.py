"""Compares float32, bfloat16 and int8 linear layers of a patched DeBERTa on a CPU: time, and agreement of the answers.

    python examples/int8.py                  # a DeBERTa-v3-base with random weights, a few minutes
    python examples/int8.py --model DIR      # a checkpoint of your own, DeBERTa v1, v2 or v3

The int8 model is torch's dynamic quantisation: weights are rounded once and the inputs of linear layers in every call.
Attention stays fused, in float32. The text is that of demo.py. A prediction is the word whose embedding has the largest
product with a token's state, and a row says for how many tokens it is the float32 model's.
"""

import argparse
import copy
import warnings
from pathlib import Path
from statistics import median

import torch
from demo import Batch, answer, local_tokenizer, make_batches, make_model, trained_tokenizer
from torch import nn

import deberta_fast
from bench import timing

SHAPES = ((1, 128), (1, 512), (4, 512))  # batch and length


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    encode, options.vocabulary = local_tokenizer(options.model) if options.model else trained_tokenizer()
    model = deberta_fast.patch(make_model(options))
    models = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16(), "int8": quantised(model)}
    embeddings = model.get_input_embeddings().weight.detach()
    rows = []
    for batch in batches_of(encode, options.shapes):
        inputs = batch.tensors(model)
        runs = {name: (lambda each=each, inputs=inputs: answer(each, inputs).float()) for name, each in models.items()}
        states = {name: run() for name, run in runs.items()}
        words = {name: (each @ embeddings.T).argmax(-1) for name, each in states.items()}
        times = timing.interleaved(runs, options.repeats, warmup=0)
        for name in models:
            error = (states[name] - states["float32"]).norm() / states["float32"].norm()
            rows.append(
                {
                    "batch": len(batch.documents),
                    "length": batch.length,
                    "linear layers": name,
                    "ms": 1000 * median(times[name]),
                    "relative difference of states": error.item(),
                    "same predictions": (words[name] == words["float32"]).float().mean().item(),
                }
            )
    weights = options.model or "random"
    print(f"weights: {weights}, {torch.get_num_threads()} threads, engine {torch.backends.quantized.engine}")
    print(timing.markdown(rows))


def quantised(model: nn.Module) -> nn.Module:
    """Copies a model, with linear layers that multiply in int8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves this function to another package
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def batches_of(encode, shapes: list[tuple[int, int]]) -> list[Batch]:
    """Makes a batch of different documents for each (batch, length), without padding."""
    most, longest = (max(sizes) for sizes in zip(*shapes))
    documents = [batch.documents[0] for batch in make_batches(encode, [longest] * most) if len(batch.documents) == 1]
    cut = lambda document, length: (*document[: length - 1], document[-1])  # keeps [SEP]
    return [Batch(tuple(cut(document, length) for document in documents[:count])) for count, length in shapes]


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="a local checkpoint instead of random weights")
    parser.add_argument("--quick", action="store_true", help="2 layers of the random model and short documents")
    options = parser.parse_args(argv)
    options.layers, options.shapes = (2, [(1, 16), (2, 32)]) if options.quick else (12, list(SHAPES))
    options.repeats = 2 if options.quick else 7
    options.device, options.dtype = "cpu", "float32"
    return options


if __name__ == "__main__":
    main()
