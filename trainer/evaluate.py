"""A trained model as something that can be scored: what the fitness room asks of any language model."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.loss import token_nats
from trainer.model import EvolmForCausalLM
from trainer.objective import autocast
from trainer.recipe import Recipe

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 65_536}
"""What stays in a core's cache, or what keeps a GPU busy."""


class TokenScorer:
    """Gives the loss of every token of given windows, in the precision of the recipe."""

    def __init__(self, model: EvolmForCausalLM, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.device = model.lm_head.weight.device

    @torch.inference_mode()
    def token_nats(self, windows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Negative log-likelihood in nats of tokens 1..T given those before, shape (N, T+1) -> (N, T)."""
        self.model.eval()
        head = self.model.head()
        rows = max(1, TOKENS_PER_BATCH.get(self.device.type, 8192) // (windows.shape[1] - 1))
        pieces = []
        with autocast(self.recipe, self.device):
            for start in range(0, len(windows), rows):
                batch = torch.from_numpy(windows[start : start + rows]).to(self.device)
                hidden = self.model.model(batch[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
                nats = token_nats(
                    hidden,
                    head.weight,
                    batch[:, 1:].flatten(),
                    multiplier=head.multiplier,
                    softcap=head.softcap,
                )
                pieces.append(nats.view(len(batch), -1))
        return torch.cat(pieces).cpu().numpy()
