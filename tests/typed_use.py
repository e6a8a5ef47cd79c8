"""A user's program. ``make lint`` checks its types with ``mypy --strict``; nothing runs it."""

import torch

import deberta_fast
from deberta_fast import testing


def attention(query: torch.Tensor, table: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    output = deberta_fast.disentangled_attention(query, query, query, table, table, backend="cpu", dropout_p=0.1)
    packed = deberta_fast.disentangled_attention_varlen(
        query[0], query[0], query[0], table, table, cu_seqlens=ends, max_seqlen=9
    )
    return torch.cat([output, packed])


def models(ids: torch.Tensor) -> None:
    config = deberta_fast.DebertaV2Config(hidden_size=64, num_labels=3)
    model = deberta_fast.DebertaV2ForSequenceClassification(config)
    model.set_unpad(True)
    model(input_ids=ids, labels=ids[:, 0])
    loaded = deberta_fast.DebertaV2Model.from_pretrained("checkpoint", dtype=torch.bfloat16)
    loaded.save_pretrained("saved")


def patched(model: torch.nn.Module) -> None:
    deberta_fast.unpatch(deberta_fast.patch(model, unpad=True, padding_rows="zeros"))
    deberta_fast.set_backend_check(False)
    print(deberta_fast.check("cpu"))


def judged(backend: testing.Backend) -> dict[testing.Kind, testing.Verdict]:
    return testing.assert_backend(backend, dtype=torch.bfloat16)
