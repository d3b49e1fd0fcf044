"""Two hosts on one machine: network namespaces joined by a cable that can be cut. Needs root."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launch.experiments.chaos_trial import ENVIRONMENT, HEALTH, Place, Skipped, Trial
from storage.locations import Location

PORT = 6379
NETWORK = "10.213.7"  # .1 and .2 are the hosts; the namespaces see no other network
PATIENCE = 60.0  # seconds until a host must have joined


class Hosts:
    """Two namespaces with one Ray node each, in their `with` block. Skipped where namespaces cannot be made."""

    def __init__(self) -> None:
        self.names = [f"chaos-{secrets.token_hex(3)}-{number}" for number in (1, 2)]
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path: sockets lie below it
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Hosts":
        self._stack.callback(shutil.rmtree, self.temporary, ignore_errors=True)
        try:
            self._lay_cable()
            for number in (1, 2):
                self.start(number)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def command(self, number: int) -> list[str]:
        """Return what runs a command on a host."""
        return ["ip", "netns", "exec", self.names[number - 1]]

    def set_cable(self, state: str) -> None:
        """Cut the cable (`down`) or mend it (`up`) at the second host."""
        subprocess.run(["ip", "-n", self.names[1], "link", "set", "cable2", state], check=True)

    def pids(self) -> list[int]:
        return [process.pid for process in self._nodes.values()]

    def start(self, number: int) -> None:
        """Start a host's node; return once it has joined."""
        ray = str(Path(sys.executable).with_name("ray"))
        join = ["--head", f"--port={PORT}", f"--temp-dir={self.temporary}", "--include-dashboard=false"]
        if number != 1:
            join = [f"--address={NETWORK}.1:{PORT}"]
        options = ["--block", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
        health = {f"RAY_{name}": str(value) for name, value in HEALTH.items()}
        log = self.temporary / f"log.{number}.{time.monotonic_ns()}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*self.command(number), ray, "start", *join, f"--node-ip-address={NETWORK}.{number}", *options],
                env=os.environ | ENVIRONMENT | health, stdout=file, stderr=file,
            )  # fmt: skip
        self._nodes[number] = process
        self._stack.callback(end, process)
        deadline = time.monotonic() + PATIENCE
        while "Ray runtime started" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"host {number} did not start: {log.read_text()}")
            time.sleep(0.1)

    def restart(self, number: int) -> None:
        """End what is left of a host's node and start another."""
        end(self._nodes[number])
        self.start(number)

    def _lay_cable(self) -> None:
        first, second = self.names
        for name in self.names:
            if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
                raise Skipped("network namespaces need root and `ip`")
            self._stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=False)
        commands = [f"ip link add cable1 netns {first} type veth peer name cable2 netns {second}"]
        for number, name in enumerate(self.names, 1):
            commands += [
                f"ip -n {name} address add {NETWORK}.{number}/24 dev cable{number}",
                f"ip -n {name} link set cable{number} up",
                f"ip -n {name} link set lo up",
            ]
        for command in commands:
            if subprocess.run(command.split(), check=False, capture_output=True).returncode:
                raise Skipped(f"not allowed here: {command}")


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def on_two_hosts(folder: Path) -> Iterator[Place]:
    """One worker on each of two hosts, and a folder that both see."""
    if shutil.which("ip") is None:
        raise Skipped("network namespaces need root and `ip`")
    with Hosts() as hosts:

        def cut(trial: Trial) -> bool:
            """Cut the cable, mend it once the driver has given the other host up, and let a new node join there."""
            trial.wait_for(lambda: len(trial.workers()) > 1, "a worker on each host")
            lost = trial.lost()
            hosts.set_cable("down")
            noticed = trial.wait_for(lambda: trial.lost() > lost, "the other host to be given up")
            hosts.set_cable("up")
            hosts.restart(2)
            return noticed

        yield Place(
            Location.parse(str(folder / "run")),
            cluster={"backend": "ray", "workers": 2, "address": f"{NETWORK}.1:{PORT}"},
            command=hosts.command(1),
            roots=hosts.pids,
            faults={"cable cut": cut},
        )
