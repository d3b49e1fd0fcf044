"""How every experiment leaves its pictures."""

from pathlib import Path

from matplotlib.figure import Figure


def save(figure: Figure, folder: str, name: str, dpi: int = 100) -> None:
    """Write a figure as NAME.png and NAME.svg."""
    for kind in ("png", "svg"):
        figure.savefig(Path(folder) / f"{name}.{kind}", dpi=dpi)
