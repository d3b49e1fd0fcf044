import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from actors.pool import PoolError
from actors.run_stage import StageStopped
from launch.command import INTERRUPTED, run_command
from launch.messages import plain_errors, tell

ROOT = Path(__file__).parents[2]


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


def test_sigterm_ends_a_command_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, plain_errors():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert ended.value.code == 143
    assert capsys.readouterr().err == f"{INTERRUPTED}\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("script", ["score", "train"])
def test_ctrl_c_while_a_script_still_imports_is_one_message_too(script: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")  # stands for a key pressed in the slowest import
    ran = subprocess.run(
        [sys.executable, ROOT / f"launch/{script}.py", "job.yaml"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode in (130, -signal.SIGINT)
    assert ran.stderr == f"{INTERRUPTED}\n"


def test_what_a_job_says_goes_where_its_progress_goes(capsys: pytest.CaptureFixture[str]) -> None:
    tell("train: 40 examples")
    assert capsys.readouterr() == ("", "train: 40 examples\n")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_short_and_long_ask_for_help(flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def main(config: str) -> None:
        """Do it."""

    monkeypatch.setattr(sys, "argv", ["do", flag])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 0
    assert "Do it." in capsys.readouterr().out


def test_our_own_bugs_keep_their_traceback() -> None:
    with pytest.raises(KeyError), plain_errors():
        raise KeyError("ours")
