"""Continues masked-language training on long texts from a checkpoint that was trained on short ones.

    python examples/continue_masked_language.py --checkpoint DIR   # a DeBERTa v2 or v3 with its language model
    python examples/continue_masked_language.py                    # a small one, which is first trained at 512 tokens

Nothing of the model changes but the length: positions are relative, their distances fall into buckets that grow with
the logarithm, and all distances beyond the largest share its bucket. The text is the standard library that comes with
Python. The program prints the loss on text held out at both lengths, before and after, and saves the model in --out.
"""

import argparse
import sys
from pathlib import Path

import torch
from library_text import loaded, modules, small_config, trained_tokenizer
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from deberta_fast import DebertaV2ForMaskedLM, DebertaV2Tokenizer

MASKED, BY_MASK, BY_CHANCE = 0.15, 0.8, 0.1  # of the tokens; of the masked ones
FROM_SCRATCH = 2e-3  # learning rate of the small model
HELD_OUT = 10  # every tenth module is for the test


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    torch.manual_seed(0)
    texts = [text for text, _ in modules()][:: 6 if options.toy else 1]
    if options.checkpoint is None:
        options.checkpoint = options.out / "short"
        make_checkpoint(options, texts)
    model, tokenizer = loaded(DebertaV2ForMaskedLM, options.checkpoint)
    _check_length(model, options.length)
    model.to(options.device).gradient_checkpointing_enable()
    train, test = split(texts, tokenizer)
    lengths = (options.short, options.length)
    before = {length: evaluate(model, test, length, tokenizer) for length in lengths}
    fit(model, train, options.length, options.steps, options.rate, tokenizer)
    after = {length: evaluate(model, test, length, tokenizer) for length in lengths}
    for length in lengths:
        print(f"held-out loss at {length} tokens: {before[length]:.3f} before, {after[length]:.3f} after")
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"saved: {options.out}")


def make_checkpoint(options: argparse.Namespace, texts: list[str]) -> None:
    """Trains a small model on short texts, in place of a checkpoint that one would have."""
    size = 1000 if options.toy else 8000
    tokenizer = trained_tokenizer(texts, size, options.checkpoint)
    model = DebertaV2ForMaskedLM(small_config(len(tokenizer), options.toy)).to(options.device)
    train, _ = split(texts, tokenizer)
    fit(model, train, options.short, options.steps, FROM_SCRATCH, tokenizer, batch=8)
    model.save_pretrained(options.checkpoint)
    tokenizer.save_pretrained(options.checkpoint)


def split(texts: list[str], tokenizer: DebertaV2Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens of all modules for training, and those of all modules held out, each (N,)."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    joined = lambda parts: torch.tensor([token for part in parts for token in part])
    return joined(x for index, x in enumerate(ids) if index % HELD_OUT), joined(ids[::HELD_OUT])


def stretch(tokens: torch.Tensor, start: int, length: int, tokenizer: DebertaV2Tokenizer) -> torch.Tensor:
    """Returns [CLS], tokens from ``start`` on, and [SEP], (length,); shorter at the end of the text."""
    ends = torch.tensor([tokenizer.cls_token_id]), torch.tensor([tokenizer.sep_token_id])
    return torch.cat((ends[0], tokens[start : start + length - 2], ends[1]))


def masked(
    ids: torch.Tensor, tokenizer: DebertaV2Tokenizer, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids with some of them masked, and where these are, bool; both of the shape of ids."""
    draw = lambda: torch.rand(ids.shape, generator=generator)
    special = (ids == tokenizer.cls_token_id) | (ids == tokenizer.sep_token_id)
    chosen, how = (draw() < MASKED) & ~special, draw()
    others = torch.randint(tokenizer.mask_token_id + 1, len(tokenizer), ids.shape, generator=generator)
    given = torch.where(chosen & (how < BY_MASK), tokenizer.mask_token_id, ids)
    return torch.where(chosen & (how > 1 - BY_CHANCE), others, given), chosen


def loss_of(model: DebertaV2ForMaskedLM, ids: torch.Tensor, tokenizer, generator: torch.Generator) -> torch.Tensor:
    """Returns the mean loss at the masked tokens of ids (B, L).

    Only their states meet the vocabulary: the scores of all tokens would take L times 128,100 floats.
    """
    given, chosen = masked(ids, tokenizer, generator)
    states, _ = model.predicting_states(given.to(model.device))
    logits = model.lm_predictions(states[chosen.to(model.device)], model.get_input_embeddings())
    return F.cross_entropy(logits.float(), ids[chosen].to(model.device))


def fit(
    model: DebertaV2ForMaskedLM, train: torch.Tensor, length: int, steps: int, rate: float, tokenizer, batch: int = 1
) -> None:
    """Trains on stretches of the text, ``batch`` of them a step."""
    generator = torch.Generator().manual_seed(length)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate, weight_decay=0.01)
    for _ in (progress := tqdm(range(steps), unit="step", desc=f"{length} tokens")):
        starts = torch.randint(len(train) - length + 2, (batch,), generator=generator).tolist()
        ids = torch.stack([stretch(train, start, length, tokenizer) for start in starts])
        loss = loss_of(model, ids, tokenizer, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix_str(f"loss {loss.item():.3f}")


@torch.no_grad()
def evaluate(model: DebertaV2ForMaskedLM, test: torch.Tensor, length: int, tokenizer) -> float:
    """Returns the mean loss over the text held out, cut into stretches, with the same masks every time."""
    model.eval()
    generator, losses = torch.Generator().manual_seed(0), []
    for start in range(0, len(test) - length + 3, length - 2):
        ids = stretch(test, start, length, tokenizer).unsqueeze(0)
        losses.append(loss_of(model, ids, tokenizer, generator).item())
    if not losses:
        sys.exit(f"--length {length}: the text held out has only {len(test)} tokens")
    return sum(losses) / len(losses)


def _check_length(model: DebertaV2ForMaskedLM, length: int) -> None:
    config = model.config
    absolute = config.position_biased_input or config.enhanced_mask_decoder
    if absolute and length > config.max_position_embeddings:
        sys.exit(
            f"--length must be at most {config.max_position_embeddings}, since this model adds absolute positions; "
            f"got {length}"
        )


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a folder, instead of a small model")
    parser.add_argument("--length", type=int, metavar="L", help="tokens of a text (8192)")
    parser.add_argument("--steps", type=int, metavar="N", help="at that length, one text each (200)")
    parser.add_argument("--rate", type=float, help="learning rate (1e-3 for the small model, 2e-5 for a checkpoint)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--toy", action="store_true", help="a tiny model, 64 tokens and then 512")
    parser.add_argument("--out", type=Path, default=Path("masked-language"), metavar="DIR")
    options = parser.parse_args(argv)
    options.short, length, steps = (64, 512, 40) if options.toy else (512, 8192, 200)
    options.length, options.steps = options.length or length, options.steps or steps
    options.rate = options.rate or (FROM_SCRATCH / 2 if options.checkpoint is None else 2e-5)
    for name, least in (("length", options.short), ("steps", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    return options


if __name__ == "__main__":
    main()
