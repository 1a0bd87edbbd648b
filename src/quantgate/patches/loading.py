"""Let an engine that asks for it watch its weights while they are loaded.

Between loading and serving, vLLM repacks weights for its kernels; only before that do they have the
file's layout. The settings of an engine name the function that watches, so that a server that asks
for none is not affected.
"""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

from quantgate.patches.scoremode.hooks import LOADING, hook
from quantgate.patches.wanted import wanted

# The setting with the full name of a context manager that takes the model and its directory.
WATCH = "watch_loading"


@hook(
    "vllm.model_executor.model_loader.base_loader",
    "process_weights_after_loading",
    feature=LOADING,
)
def process_weights_after_loading(
    stock: Any, model: Any, model_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Call the engine's watch around the repacking of its weights, if it has one."""
    if (watch := wanted().get(WATCH)) is None:
        return stock(model, model_config, *args, **kwargs)
    with pkgutil.resolve_name(watch)(model, Path(model_config.model)):
        return stock(model, model_config, *args, **kwargs)
