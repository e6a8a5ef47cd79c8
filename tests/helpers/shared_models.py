"""Models whose sequences several processes share, compared with one process that has whole sequences."""

import native_models
import torch
from training import build, gradients

from deberta_fast.data import PackedCollator
from deberta_fast.distributed import context_parallel, shard_batch, unshard
from deberta_fast.op.context_parallel import ring

PER_TOKEN = ("last_hidden_state", "start_logits", "end_logits")


def batch_for(head: str, layout: str) -> dict:
    """A padded batch, or with layout "packed" sequences of which one is longer than a stretch, with labels."""
    if layout == "packed":
        random = torch.Generator().manual_seed(5)
        texts = [torch.randint(1, 70, (length,), generator=random) for length in (4, 29, 1, 60, 11, 12)]
        of_tokens = head in ("ForMaskedLM", "ForTokenClassification")
        batch = PackedCollator()([{"input_ids": x, "labels": x % 2 if of_tokens else int(x[0]) % 2} for x in texts])
        batch["token_type_ids"] = batch["input_ids"] % 2
        labels = batch.pop("labels")
    else:
        batch = native_models.tokens(layout)
        ids = batch["input_ids"]
        if head == "ForMultipleChoice":
            batch = {name: torch.stack([x, x.flip(1)], 1) for name, x in batch.items()}
            return batch | {"labels": ids[:, 0] % 2}
        labels = ids[:, 0] % 2 if head == "ForSequenceClassification" else ids % 2
        if head in ("ForMaskedLM", "ForTokenClassification"):
            labels = labels.masked_fill(torch.arange(ids.shape[1]) % 5 == 0, -100)
    if head == "ForQuestionAnswering":
        places = torch.tensor([3, 20, 0, 50, 5, 11]) if layout == "packed" else torch.tensor([3, 40, 999])
        return batch | {"start_positions": places, "end_positions": places + 1}
    return batch if head == "Model" else batch | {"labels": labels}


def made(kind, name, head, changes) -> torch.nn.Module:
    model = build(kind, name, head, **changes).double()
    if kind == "native":
        # Without padding, tokens have other places in the dropout mask, and padding one row for the mask decoder.
        model.set_unpad(False)
    return model


def objective(output) -> torch.Tensor:
    if output.get("loss") is not None:
        return output.loss
    return (output.last_hidden_state * torch.linspace(-1, 1, output.last_hidden_state.shape[-1])).pow(2).sum()


def results(model, output, joined=lambda name, x: x) -> dict:
    found = {"gradients": gradients(model)}
    found |= {name: joined(name, x).detach() for name, x in output.items() if isinstance(x, torch.Tensor)}
    if "hidden_states" in output:
        found["hidden_states"] = torch.stack([joined("last_hidden_state", x) for x in output.hidden_states]).detach()
    return found


def alone(kind, name, head, layout, changes) -> dict:
    model = made(kind, name, head, changes)
    output = model(**batch_for(head, layout), output_hidden_states=True)
    objective(output).backward()
    return results(model, output)


def of_process(kind, name, head, layout, changes, method) -> dict | None:
    ring.GATHER_BYTES = 1 << 40 if method == "gather" else -1
    model = context_parallel(made(kind, name, head, changes), None, "heads" if method == "heads" else "ring")
    output = model(**shard_batch(batch_for(head, layout)), output_hidden_states=True)
    if "loss" in output:
        output.loss.backward()
    else:
        # The sum of the processes' objectives is the whole one, whose gradient is a mean here.
        (objective(output) * torch.distributed.get_world_size()).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()
    of_tokens = (*PER_TOKEN, *["logits"] * (head in ("ForMaskedLM", "ForTokenClassification")))
    dim = 0 if layout == "packed" else 1
    return results(model, output, lambda name, x: unshard(x, dim=dim) if name in of_tokens else x)


def compare(found: list[dict], expected: dict, tolerance: float = 1e-10) -> None:
    for got in found:
        assert got.keys() == expected.keys()
        assert got["gradients"].keys() == expected["gradients"].keys()
        largest = max(x.abs().max() for x in expected["gradients"].values())
        for name, x in [*expected["gradients"].items(), *expected.items()]:
            if name == "gradients":
                continue
            y = got["gradients"][name] if name in got["gradients"] else got[name]
            scale = float(max(x.detach().abs().max(), 1e-3 * largest))
            torch.testing.assert_close(
                y, x, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
            )


# Everything that needs other processes at least once for native and patched models: (name, head, layout, changes).
CASES = [
    ("v1", "Model", "holes", {}),
    ("v1", "ForSequenceClassification", "right", {}),
    ("v1", "ForMaskedLM", "packed", {}),
    ("v2", "Model", "left", {}),
    ("v2", "ForTokenClassification", "packed", {}),
    ("v2", "ForMaskedLM", "right", {}),
    ("v2", "ForQuestionAnswering", "holes", {}),
    ("v3", "Model", "packed", {}),
    ("v3", "ForTokenClassification", "right", {}),
    ("v3", "ForSequenceClassification", "packed", {}),
    ("v3", "ForMultipleChoice", "right", {}),
    ("v3", "ForSequenceClassification", "left", {"attention_probs_dropout_prob": 0.3}),
    ("v3", "ForMaskedLM", "packed", {"attention_probs_dropout_prob": 0.3}),
]  # fmt: skip


def check(pool, kind, method, name, head, layout, changes):
    if method == "heads" and pool.number == 3:
        changes = changes | {"num_attention_heads": 6, "hidden_size": 48}
    torch.manual_seed(0)  # as the processes do: the first one's generator draws the dropout seeds
    expected = alone(kind, name, head, layout, changes)
    # Hugging Face's norm of v1 computes in float32.
    tolerance = 1e-5 if (kind, name) == ("patched", "v1") else 1e-10
    compare(pool.run(of_process, kind, name, head, layout, changes, method), expected, tolerance)


def in_inference(kind, layout):
    """States by whole sequences and by stretches, twice each: the second call finds cached tables."""
    model, batch = made(kind, "v3", "Model", {}).eval(), batch_for("Model", layout)
    with torch.inference_mode():
        expected = [model(**batch).last_hidden_state for _ in range(2)]
        context_parallel(model, None)
        dim = 0 if layout == "packed" else 1
        found = [unshard(model(**shard_batch(batch)).last_hidden_state, dim=dim) for _ in range(2)]
        context_parallel(model, False)
        return [*expected, model(**batch).last_hidden_state], found


def check_inference(pool, kind, layout):
    for expected, found in pool.run(in_inference, kind, layout):
        for x in (*expected, *found):
            torch.testing.assert_close(x, expected[0], rtol=0, atol=1e-10)
