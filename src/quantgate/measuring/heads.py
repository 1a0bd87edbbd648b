"""Models whose heads transformers has no class for, by the architecture in their config.json.

vLLM serves them natively; these are HF modules, for the reference and for training.
"""

from __future__ import annotations

import functools
from typing import Any

PROCESS_REWARD = "Qwen2ForProcessRewardModel"
COLBERT = "HF_ColBERT"
# Keys under which a ColBERT's config may give the width of its projection.
_COLBERT_WIDTHS = ("colbert_dim", "projection_dim")


@functools.cache
def head_classes() -> dict[str, Any]:
    """Return the `PreTrainedModel` classes by architecture; each returns `.logits` [1, n, D]."""
    import torch
    from transformers import BertModel, BertPreTrainedModel, Qwen2Model, Qwen2PreTrainedModel
    from transformers.modeling_outputs import TokenClassifierOutput

    class Qwen2ForProcessRewardModel(Qwen2PreTrainedModel):  # type: ignore[misc]
        """Qwen2.5-Math-PRM: two labels per token, from Linear, ReLU, Linear."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = Qwen2Model(config)
            width = config.hidden_size
            self.score = torch.nn.Sequential(
                torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 2)
            )
            self.post_init()

        def forward(self, input_ids: Any, **options: Any) -> Any:
            hidden = self.model(input_ids, **options).last_hidden_state
            return TokenClassifierOutput(logits=self.score(hidden))

    class HF_ColBERT(BertPreTrainedModel):  # type: ignore[misc]
        """ColBERT (Khattab and Zaharia, 2020): a projection without bias of each BERT token."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert = BertModel(config, add_pooling_layer=False)
            widths = (getattr(config, name, None) for name in _COLBERT_WIDTHS)
            width = next((width for width in widths if width), config.hidden_size)
            self.linear = torch.nn.Linear(config.hidden_size, width, bias=False)
            self.post_init()

        def forward(self, input_ids: Any, **options: Any) -> Any:
            hidden = self.bert(input_ids, **options).last_hidden_state
            return TokenClassifierOutput(logits=self.linear(hidden))

    return {PROCESS_REWARD: Qwen2ForProcessRewardModel, COLBERT: HF_ColBERT}
