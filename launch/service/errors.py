"""What can stand in the way of an answer, beside ValueError for a caller's mistake and OSError for the storage."""


class NotFound(LookupError):  # noqa: N818
    """A run, scores, query, example or job that is not there."""


class NotReady(Exception):  # noqa: N818
    """Something that the run's job has not made yet."""


class NotOnline(Exception):  # noqa: N818
    """Scores whose method cannot answer new text at once."""


class Busy(Exception):  # noqa: N818
    """This service is at work on another job."""
