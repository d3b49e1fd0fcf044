import errno

import pytest

from actors.pool import PoolError
from actors.run_stage import StageStopped
from launch.messages import plain_errors


@pytest.mark.parametrize(
    ("error", "shown", "status"),
    [
        (ValueError("x=1 is not allowed"), "error: x=1 is not allowed\n", 1),
        (FileNotFoundError("no such file"), "error: no such file\n", 1),
        (OSError(errno.ENOSPC, "full"), f"error: [Errno {errno.ENOSPC}] full\n", 1),
        (FloatingPointError("query 3 is not finite"), "error: query 3 is not finite\n", 1),
        (PoolError("no worker"), "error: no worker\n", 1),
        (StageStopped("stage s: full"), "stopped: stage s: full\n", 1),
        (StageStopped("stage s: a bug", "Traceback …"), "stopped: stage s: a bug\nTraceback …\n", 1),
        (KeyboardInterrupt(), "interrupted: what was done is kept; run the same command again to resume\n", 130),
    ],
)
def test_a_failure_is_one_message_and_a_status(
    error: BaseException, shown: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, plain_errors():
        raise error
    assert ended.value.code == status
    assert capsys.readouterr().err == shown


def test_our_own_bugs_keep_their_traceback() -> None:
    with pytest.raises(KeyError), plain_errors():
        raise KeyError("ours")
