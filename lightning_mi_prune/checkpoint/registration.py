"""Auto classes of transformers open folders of pruned models once this package is imported.

A folder whose config cannot describe the model names this package as its ``model_type``. Plain
transformers then refuse it with that name, instead of loading layers with random weights; with
this package imported, the type is known to them like any other.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from lightning_mi_prune.checkpoint.recorded import config_of, pruned_type
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import MODEL_TYPE

__all__ = ["register"]


def register(configs: Any) -> None:
    """Make ``AutoConfig``, ``AutoModel`` and the like open folders of pruned models.

    Args:
        configs: ``transformers.models.auto.configuration_auto``.
    """
    configs.AutoConfig.register(MODEL_TYPE, _config_class(), exist_ok=True)


@lru_cache(maxsize=1)
def _config_class() -> Any:
    from transformers.configuration_utils import PreTrainedConfig

    class PrunedConfig(PreTrainedConfig):  # type: ignore[misc]  # without types
        """Reads the config of a pruned model as that of the class that was pruned."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """A config of the class that was pruned, which Auto classes open with this package."""
            return config_of(_pruned_class(pruned_type(config_dict)), config_dict, **kwargs)

    return PrunedConfig


@lru_cache(maxsize=64)
def _pruned_class(model_type: str) -> Any:
    """The config class of a type, as one that Auto classes distinguish from it."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    base = CONFIG_MAPPING[model_type]
    names = {"model_type": MODEL_TYPE, "__module__": __name__, "__doc__": base.__doc__}
    pruned = type(base.__name__, (base,), names)
    for name in modeling_auto.__all__:
        auto = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is not None and base in mapping:
            mapping.register(pruned, _opener(auto, pruned), exist_ok=True)
    return pruned


def _opener(auto: Any, config_class: Any) -> Any:
    """What an Auto class calls in place of a model class."""

    class Pruned:
        """Opens folders of pruned models."""

        @staticmethod
        def from_pretrained(name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            """As of the package, with the Auto class."""
            from lightning_mi_prune.checkpoint.pretrained import from_pretrained

            return from_pretrained(auto, name_or_path, *args, **kwargs)

        @staticmethod
        def _from_config(config: Any, **_: Any) -> Any:
            raise PruningError(
                f"{auto.__name__}.from_config builds random weights, but the config is that of a "
                f"pruned model; expected {auto.__name__}.from_pretrained(folder), or the config "
                "of the model as built."
            )

    Pruned.config_class = config_class  # type: ignore[attr-defined]  # Auto classes compare it
    return Pruned
