"""The commands, the config, the experiments; `Run`, for notebooks; `InfluenceCallback`, for the Hugging Face Trainer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.callback import InfluenceCallback
    from launch.run import Run

__all__ = ["InfluenceCallback", "Run"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: a command that needs neither does not wait for them."""
    if name == "Run":
        from launch.run import Run

        return Run
    if name == "InfluenceCallback":
        from launch.callback import InfluenceCallback

        return InfluenceCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
