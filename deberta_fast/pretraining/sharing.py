"""A generator and a discriminator that share their embeddings (DeBERTaV3, arXiv 2111.09543, section 3.2)."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from ..models.config import DebertaConfig
from ..models.task_models import DebertaForMaskedLM, DebertaV2ForMaskedLM
from .discriminator import DebertaForReplacedTokens, DebertaV2ForReplacedTokens

# The names are Microsoft's: gradient-disentangled, shared, and no embedding sharing.
SHARINGS = ("gdes", "es", "nes")


class SharedEmbedding(nn.Module):
    """Embeddings made of another model's: E_D = stop_gradient(E_G) + E_delta, or E_D = E_G itself.

    E_delta is the parameter ``_weight``, zeros at first. Its gradient is that of E_D, and nothing of it reaches E_G.
    Ids are looked up in both tables, whose sum of V x H numbers is never made.

    Args:
        source: the generator's embeddings. They stay the generator's, and are no parameters of this module.
        difference: whether there is an E_delta. Without one, gradients flow into the generator's embeddings.
    """

    def __init__(self, source: nn.Embedding, difference: bool):
        super().__init__()
        self._source = (source,)  # a tuple keeps it from becoming a part of this module
        self.num_embeddings, self.embedding_dim = source.num_embeddings, source.embedding_dim
        self.padding_idx = source.padding_idx
        if difference:
            self._weight = nn.Parameter(torch.zeros_like(source.weight))
        else:
            self.register_parameter("_weight", None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Int64 (...) to (..., width)."""
        theirs = F.embedding(ids, self._of_source(), self.padding_idx)
        if self._weight is None:
            return theirs
        # A sharded model may compute in a narrower dtype than that of the generator's parameters.
        return theirs.to(self._weight.dtype) + F.embedding(ids, self._weight, self.padding_idx)

    @property
    def weight(self) -> torch.Tensor:
        """The sum, (V, width)."""
        theirs = self._of_source()
        return theirs if self._weight is None else theirs.to(self._weight.dtype) + self._weight

    def _of_source(self) -> torch.Tensor:
        weight = self._source[0].weight
        if self._weight is None:
            return weight
        weight = weight.detach()
        # FSDP leaves every process a shard of it, except in the generator's own forward.
        return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


class ReplacedTokenModels(nn.Module):
    """The two models of replaced-token detection, with one of the sharings.

    The names of its parameters are those of Microsoft's joined files: ``generator.*`` and ``discriminator.*``, with
    ``word_embeddings._weight`` for E_delta.

    Args:
        config: the discriminator's.
        generator_layers: the generator's depth, half of the discriminator's by default. Nothing else differs but its
            enhanced mask decoder, which is there unless positions are added to the input.
        sharing: "gdes", "es" or "nes".

    Raises:
        ValueError: sharing is something else, or there are too few layers.
    """

    def __init__(self, config: DebertaConfig, generator_layers: int | None = None, sharing: str = "gdes"):
        super().__init__()
        check_sharing(sharing)
        self.sharing = sharing
        second = config.generation > 1
        self.generator = (DebertaV2ForMaskedLM if second else DebertaForMaskedLM)(
            generator_config(config, generator_layers)
        )
        config = copy.deepcopy(config)
        config.enhanced_mask_decoder = False
        self.discriminator = (DebertaV2ForReplacedTokens if second else DebertaForReplacedTokens)(config)
        self.share()

    def share(self) -> None:
        """Makes the discriminator's embeddings of words, and of positions if it has any, the shared ones."""
        if self.sharing == "nes":
            return
        theirs, own = self.generator.deberta.embeddings, self.discriminator.deberta.embeddings
        for name in ("word_embeddings", "position_embeddings"):
            if getattr(own, name) is not None:
                setattr(own, name, SharedEmbedding(getattr(theirs, name), self.sharing == "gdes"))

    @torch.no_grad()
    def set_discriminator_embeddings(self, merged: dict[str, torch.Tensor]) -> None:
        """Takes E_D of words and positions, by name: E_delta becomes E_D - E_G.

        Raises ValueError if the embeddings are shared without a difference, and E_D is not E_G.
        """
        for name, value in merged.items():
            embedding = getattr(self.discriminator.deberta.embeddings, name)
            if not isinstance(embedding, SharedEmbedding):
                embedding.weight.copy_(value)
            elif embedding._weight is not None:
                embedding._weight.copy_(value.to(embedding._weight.device) - embedding._of_source())
            elif not torch.equal(embedding.weight.cpu(), value.cpu()):
                raise ValueError(f"sharing='es' needs equal {name} of generator and discriminator, and they differ")


def generator_config(config: DebertaConfig, layers: int | None = None) -> DebertaConfig:
    """Makes the generator's configuration from the discriminator's; see ``ReplacedTokenModels``."""
    if layers is None:
        layers = config.num_hidden_layers // 2
    if layers < 1:
        raise ValueError(
            f"the generator needs a layer at least: generator_layers={layers}, num_hidden_layers="
            f"{config.num_hidden_layers}"
        )
    made = copy.deepcopy(config)
    made.num_hidden_layers = layers
    made.enhanced_mask_decoder = not config.position_biased_input
    return made


def check_sharing(sharing: str) -> None:
    if sharing not in SHARINGS:
        raise ValueError(f"sharing must be one of {', '.join(SHARINGS)}, got {sharing!r}")
