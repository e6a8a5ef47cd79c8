"""Fine-tunes a classifier of long documents: packed batches, activation checkpointing, one process or several.

    python examples/long_documents.py                        # a small model from scratch, 8192 tokens a document
    python examples/long_documents.py --checkpoint DIR       # a DeBERTa v2 or v3 of your own
    torchrun --nproc-per-node 2 examples/long_documents.py   # every process has its own documents
    torchrun --nproc-per-node 2 examples/long_documents.py --share documents  # each has a stretch of every document

A document is a module of Python's standard library, and its label the package that it belongs to. The model and its
tokenizer are saved in --out.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from library_text import PACKAGES, loaded, modules, small_config, trained_tokenizer
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from deberta_fast import DebertaV2ForSequenceClassification, DebertaV2Tokenizer
from deberta_fast.data import PackedCollator, TokenBudgetSampler
from deberta_fast.distributed import context_parallel, loss_weights, shard_batch

HELD_OUT = 5  # every fifth document is for the test


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    processes = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if processes > 1:
        distributed.init_process_group("nccl" if options.device == "cuda" else "gloo")
    rank = distributed.get_rank() if processes > 1 else 0
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        run(options, rank, processes)
    finally:
        if processes > 1:
            distributed.destroy_process_group()


def run(options: argparse.Namespace, rank: int, processes: int) -> None:
    texts = modules()
    torch.manual_seed(0)
    model, tokenizer = model_and_tokenizer(options, [text for text, _ in texts], rank, processes)
    model.gradient_checkpointing_enable()
    features = [
        {"input_ids": tokenizer(text, truncation=True, max_length=options.length)["input_ids"], "label": label}
        for text, label in texts
    ]
    test, train = features[::HELD_OUT], [x for index, x in enumerate(features) if index % HELD_OUT]
    torch.manual_seed(rank)  # dropout differs between processes
    losses = fit(model, train, options, rank, processes)
    right = accuracy(model, test, options)
    if rank == 0:
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
        tenth = max(1, len(losses) // 10)
        first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
        print(f"loss {first:.3f} at first, {last:.3f} at last; {right:.3f} of {len(test)} documents right")
        print(f"saved: {options.out}")


def model_and_tokenizer(
    options: argparse.Namespace, texts: list[str], rank: int, processes: int
) -> tuple[DebertaV2ForSequenceClassification, DebertaV2Tokenizer]:
    if options.checkpoint is not None:
        model, tokenizer = loaded(
            DebertaV2ForSequenceClassification,
            options.checkpoint,
            num_labels=len(PACKAGES),
            ignore_mismatched_sizes=True,
        )
    else:
        if rank == 0:
            trained_tokenizer(texts[::10] if options.toy else texts, 1000 if options.toy else 8000, options.out)
        if processes > 1:
            distributed.barrier()
        tokenizer = DebertaV2Tokenizer(options.out / "spm.model")
        config = small_config(len(tokenizer), options.toy, num_labels=len(PACKAGES))
        model = DebertaV2ForSequenceClassification(config).train()
    if model.config.position_biased_input and options.length > model.config.max_position_embeddings:
        longest = model.config.max_position_embeddings
        sys.exit(f"--length must be at most {longest}, since this model adds absolute positions; got {options.length}")
    return model.to(options.device), tokenizer


def fit(model: nn.Module, train: list[dict], options: argparse.Namespace, rank: int, processes: int) -> list[float]:
    """Trains, and returns the loss of every step: that of this process's documents, or of those that all share."""
    shared = processes > 1 and options.share == "documents"
    if shared:
        context_parallel(model)
    # Either way the gradients are averaged over the processes.
    call = DistributedDataParallel(model) if processes > 1 else model
    lengths, replicas = [len(x["input_ids"]) for x in train], 1 if shared else processes
    sampler = TokenBudgetSampler(lengths, options.tokens, num_replicas=replicas, rank=0 if shared else rank)
    loader = DataLoader(train, batch_sampler=sampler, collate_fn=PackedCollator())
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    batches = itertools.islice(endless(loader, sampler), options.steps)
    losses: list[float] = []
    for batch in (progress := tqdm(batches, total=options.steps, unit="step", disable=rank > 0)):
        # A process with more documents counts more.
        weight = 1 if shared else loss_weights([batch["labels"]])[0].to(options.device)
        loss = call(**moved(shard_batch(batch) if shared else batch, options.device)).loss
        (weight * loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix_str(f"loss {losses[-1]:.3f}")
    if shared:
        context_parallel(model, False)
    return losses


def endless(loader: DataLoader, sampler: TokenBudgetSampler) -> Iterator[dict]:
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


@torch.inference_mode()
def accuracy(model: nn.Module, test: list[dict], options: argparse.Namespace) -> float:
    """Returns the share of documents whose package the model finds. Every process reads all of them."""
    model.eval()
    sampler = TokenBudgetSampler([len(x["input_ids"]) for x in test], options.tokens, shuffle=False)
    right = 0
    for batch in DataLoader(test, batch_sampler=sampler, collate_fn=PackedCollator()):
        batch = moved(batch, options.device)
        right += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    return right / len(test)


def moved(batch: dict, device: str) -> dict:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a folder, instead of a small model from scratch"
    )
    parser.add_argument("--length", type=int, metavar="L", help="longer documents are cut (8192)")
    parser.add_argument("--tokens", type=int, metavar="T", help="of a batch, at most; at least --length (16384)")
    parser.add_argument("--steps", type=int, metavar="N", help="of the optimizer (200)")
    parser.add_argument("--rate", type=float, help="learning rate (5e-4 from scratch, 2e-5 from a checkpoint)")
    parser.add_argument("--share", choices=("batches", "documents"), default="batches", help="among processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--toy", action="store_true", help="a tiny model and short documents")
    parser.add_argument("--out", type=Path, default=Path("long-documents"), metavar="DIR")
    options = parser.parse_args(argv)
    length, tokens, steps, rate = (256, 2048, 40, 3e-3) if options.toy else (8192, 16384, 200, 5e-4)
    options.length = options.length or length
    options.tokens = options.tokens or max(tokens, options.length)
    options.steps = options.steps or steps
    options.rate = options.rate or (rate if options.checkpoint is None else 2e-5)
    for name, least in (("length", 8), ("tokens", options.length), ("steps", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    return options


if __name__ == "__main__":
    main()
