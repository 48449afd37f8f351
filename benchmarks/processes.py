"""Servers, and the clients that drive them, as processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.workload import CACHE

LOGS = CACHE / "logs"
START_SECONDS = 300
END_SECONDS = 20


class NotAvailableError(Exception):
    """Something that cannot be measured here, and why."""


class Driver:
    """A script of drivers/ that serves commands, see drivers/driver.py."""

    def __init__(self, name: str, command: Sequence[str | Path]) -> None:
        self._log = LOGS / f"{name} client.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(each) for each in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __call__(self, op: str, **arguments: Any) -> Any:
        """Carries out an operation: its answer."""
        self.send(op, **arguments)
        return self.answer()

    def send(self, op: str, **arguments: Any) -> None:
        """Begins an operation; `answer` waits for its end."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The answer to what was sent."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a client ended, see {self._log}")
        return json.loads(line)

    def memory(self) -> int:
        """Its resident bytes."""
        resident: int = psutil.Process(self._process.pid).memory_info().rss
        return resident

    def close(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.communicate()


class Server:
    """A server, with the processes it starts in a group of their own.

    ready: what it prints once it can be used. The constructor waits for that.
    start_seconds: how long that took. peak: the most memory that its processes took together since
        the start, or since it was set to 0, in bytes, looked at ten times a second.

    Raises:
        NotAvailableError: it ended instead, or took longer than START_SECONDS.
    """

    def __init__(
        self, name: str, command: Sequence[str | Path], ready: str, environment: Mapping[str, str]
    ) -> None:
        self._log = LOGS / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(each) for each in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=CACHE,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()
        started = time.monotonic()
        try:
            self._wait_for(ready)
            self.start_seconds = time.monotonic() - started
        except BaseException:
            self.close()
            raise

    def _wait_for(self, ready: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while ready not in (said := self._log.read_text("utf-8", errors="replace")):
            if self._process.poll() is not None or time.monotonic() > deadline:
                last = " / ".join(said.strip().splitlines()[-2:])
                raise NotAvailableError(f"it did not start: {last}")
            time.sleep(0.1)

    def memory(self, using: Path | None = None) -> int:
        """Resident bytes of all its processes together, or of those with a file open in `using`."""
        processes = self._processes()
        if using is not None:
            processes = [each for each in processes if _uses(each, using)]
        return sum(each.memory_info().rss for each in processes)

    def proportional_memory(self) -> int:
        """Bytes of all its processes together; pages that some of them share count once."""
        sizes = (_proportional(process) for process in self._processes())
        return sum(sizes)

    def cpu_seconds(self) -> float:
        """Processor time of all its processes since they started."""
        times = (process.cpu_times() for process in self._processes())
        return sum(each.user + each.system for each in times)

    def listeners(self) -> dict[int, psutil.Process]:
        """Its gateway and executors, by each port that they listen on."""
        return {
            connection.laddr.port: process
            for process in self._processes()[1:]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }

    def send_signal(self, number: int) -> None:
        """Sends a signal to the command."""
        self._process.send_signal(number)

    def is_running(self) -> bool:
        """Whether the command has not ended."""
        return self._process.poll() is None

    def _processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def _watch(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while self._process.returncode is None:
                self.peak = max(self.peak, self.proportional_memory())
                time.sleep(0.1)

    def usage(self) -> tuple[int, int]:
        """Open descriptors and threads of all its processes together."""
        parent = psutil.Process(self._process.pid)
        processes = [parent, *parent.children(recursive=True)]
        descriptors = sum(each.num_fds() for each in processes)
        return descriptors, sum(each.num_threads() for each in processes)

    def errors(self) -> int:
        """Tracebacks in its log."""
        return self._log.read_text("utf-8", errors="replace").count("Traceback")

    def close(self) -> None:
        """Asks it to end, and kills what is left of its group after END_SECONDS."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _proportional(process: psutil.Process) -> int:
    """Its resident bytes, each page divided by the number of processes that share it."""
    try:
        size: int = process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
        return 0
    return size


def _uses(process: psutil.Process, folder: Path) -> bool:
    return any(Path(each.path).is_relative_to(folder) for each in process.open_files())
