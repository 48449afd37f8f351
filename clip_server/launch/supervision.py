"""Supervises the processes of a flow: restarts those that die or hang, and ends them in order."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from clip_server import logs
from clip_server.launch.heartbeats import Pulse
from clip_server.launch.jina_internals import FlowProcess
from clip_server.launch.start_failures import StartFailures

_LOOK_SECONDS = 0.1
# The pause before a restart: none after the first death in a row, then this, doubled each time.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0
# A process that was ready for this long has recovered: its next death is the first in a row.
_RECOVERED_SECONDS = 10.0
# Beyond the grace period: for the gateway to end by itself, and for the executors.
_GATEWAY_SECONDS, _EXECUTORS_SECONDS = 0.3, 1.0
# For a killed process to vanish; one that is stuck in the kernel does not.
_KILL_SECONDS = 0.4
# Executors that are silent for this long would not react to SIGTERM.
_SILENT_SECONDS = 2.0


@dataclass(frozen=True)
class Supervision:
    """How a flow is supervised.

    max_restarts: of one process in a row, before it stays down; 0: none is restarted.
    hang_seconds: a process that shows no sign of life for so long is killed and restarted.
    max_batch_seconds: an encoder shows no sign of life either while a batch takes longer than
        this, and far longer than such batches have taken.
    grace_seconds: requests in flight have so long to finish when the server is told to end.
    gateways: processes that share the ports.
    """

    max_restarts: int = 5
    hang_seconds: float = 15.0
    max_batch_seconds: float = 60.0
    grace_seconds: float = 8.0
    gateways: int = 1


class SupervisedProcess:
    """A process of the flow, with its deaths."""

    def __init__(self, process: FlowProcess, settings: Supervision) -> None:
        self.process, self._settings = process, settings
        self.stays_down = False
        self._deaths = 0
        self._pulse = Pulse(process.slot)
        self._started = self._ready = time.monotonic()
        self._restart_at: float | None = None
        self._is_ready = True
        self._why_killed = ""

    def look(self, failures: StartFailures) -> None:
        """Notes what has happened to it, and restarts it when that is due.

        failures: what processes said that could not start.
        """
        now, silence = time.monotonic(), self._pulse.silence()
        if self.stays_down:
            return
        if self._restart_at is not None:
            if now >= self._restart_at:
                self._restart(now)
        elif self.process.exit_code is not None:
            self._note_death(now, self._cause_of_death(failures))
        elif silence > self._settings.hang_seconds:
            self._kill(f"showed no sign of life for {silence:.0f} s")
        elif not self._is_ready and self.process.is_ready:
            self._is_ready, self._ready = True, now
            seconds = now - self._started
            logs.announce(f"{self.process.name} is ready again after {seconds:.1f} s")
        elif not self._is_ready and now - self._started > self.process.ready_seconds:
            self._kill(f"was not ready within {self.process.ready_seconds:g} s (timeout_ready)")
        elif self._is_ready and now - self._ready > _RECOVERED_SECONDS:
            self._deaths = 0

    def _restart(self, now: float) -> None:
        self._restart_at, self._started = None, now
        self.process.restart()

    def _kill(self, why: str) -> None:
        self._why_killed = why
        self.process.kill()

    def _cause_of_death(self, failures: StartFailures) -> str:
        cause, self._why_killed = self._why_killed, ""
        if not cause and not self._is_ready:
            cause = "; ".join(failures.reasons())
        return f"{self.process.name}: {cause}" if cause else cause_of_death(self.process)

    def _note_death(self, now: float, cause: str) -> None:
        self._deaths += 1
        self._is_ready = False
        self.process.forget()
        most = self._settings.max_restarts
        if self._deaths > most:
            self.stays_down = True
            times = f", {self._deaths} times in a row" if self._deaths > 1 else ""
            message = f"{cause}{times}: it stays down (max_restarts: {most})"
            logs.announce(message, logging.ERROR)
            return
        pause = 0.0
        if self._deaths > 1:
            pause = min(_FIRST_PAUSE * 2 ** (self._deaths - 2), _LONGEST_PAUSE)
        self._restart_at = now + pause
        when = f" in {pause:g} s" if pause else ""
        message = f"{cause}: restarting it{when} ({self._deaths} of {most})"
        logs.announce(message, logging.ERROR)


class Supervisor:
    """The processes of a flow that is ready.

    processes: by the names of gateway and executors.
    """

    def __init__(
        self, processes: Mapping[str, Sequence[FlowProcess]], settings: Supervision
    ) -> None:
        self._settings = settings
        self._supervised = {
            name: [SupervisedProcess(process, settings) for process in group]
            for name, group in processes.items()
        }

    def watch(self, wait_for_signal: Callable[[float], bool], failures: StartFailures) -> int:
        """Keeps the processes running until a signal comes (0), or until one that the flow cannot
        do without stays down (1).

        wait_for_signal: whether a signal came, within so many seconds.
        failures: what processes said that could not start.
        """
        stopped = False
        while not stopped:
            stopped = wait_for_signal(_LOOK_SECONDS)
            for name, group in self._supervised.items():
                for each in group:
                    each.look(failures)
                if group and all(each.stays_down for each in group):
                    what = f"every replica of {name}"
                    if name == "gateway":
                        what = "every gateway" if len(group) > 1 else "the gateway"
                    logs.announce(f"the server ends, because {what} is down", logging.ERROR)
                    return 1
        return 0

    def stop(self, is_forced: Callable[[], bool]) -> None:
        """Ends all processes: the gateways first, which drain requests in flight while the
        executors still answer them.

        is_forced: whether to end them at once, whatever they do.
        """
        grace = time.monotonic() + self._settings.grace_seconds
        gateways = self._supervised["gateway"]
        executors = [
            each for name, group in self._supervised.items() if name != "gateway" for each in group
        ]
        # Those that are starting serve nobody.
        for each in [*gateways, *executors]:
            if not each.process.is_ready:
                each.process.kill()
        end([each.process for each in gateways], grace + _GATEWAY_SECONDS, is_forced)
        processes = [each.process for each in executors]
        end(processes, grace + _EXECUTORS_SECONDS, is_forced, _SILENT_SECONDS)


def end(
    processes: Sequence[FlowProcess],
    deadline: float,
    is_forced: Callable[[], bool] = lambda: False,
    silent_seconds: float = math.inf,
) -> None:
    """Ends processes by SIGTERM, and those that are left at the deadline by SIGKILL.

    deadline: in seconds of `time.monotonic`.
    is_forced: whether to kill all of them before.
    silent_seconds: likewise those that show no sign of life for so long.
    """
    pulses = [(process, Pulse(process.slot)) for process in processes]
    for process in processes:
        process.terminate()
    while time.monotonic() < deadline and not is_forced() and _are_left(processes):
        time.sleep(_LOOK_SECONDS)
        for process, pulse in pulses:
            if pulse.silence() > silent_seconds:
                process.kill()
    for process in processes:
        process.kill()
    killed = time.monotonic()
    while _are_left(processes) and time.monotonic() < killed + _KILL_SECONDS:
        time.sleep(0.01)


def _are_left(processes: Sequence[FlowProcess]) -> bool:
    return any(process.exit_code is None for process in processes)


def cause_of_death(process: FlowProcess) -> str:
    """How a process ended that was not told to."""
    code = process.exit_code
    if code is None or code >= 0:
        return f"{process.name} exited by itself (exit code {code})"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = ", perhaps because memory ran out" if -code == signal.SIGKILL else ""
    return f"{process.name} was killed ({name}){memory}"
