"""The version of a run's files, which its manifest states, so that a program never misreads what a later one wrote."""

from storage.locations import Location

FORMAT = 1


class NewerFormat(OSError):  # noqa: N818  it is what the reader of the message is told
    """A run was written by a later version of this program."""


def check_format(run: Location) -> None:
    """Raise NewerFormat for a run whose files this version does not know. A place without a run is fine."""
    if not run.exists("manifest.json"):
        return
    found = run.read_json("manifest.json").get("format", FORMAT)
    if found > FORMAT:
        raise NewerFormat(
            f"{run.uri} is a run of format {found}, this version reads up to {FORMAT}. Install a later one, or use another run."
        )
