"""The commands, the config, the experiments; and `Run`, for notebooks."""

from launch.run import Run

__all__ = ["Run"]
