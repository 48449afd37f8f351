"""`python -m clip_server [flow.yml | -i]`: serves a flow."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from clip_server import logs
from clip_server.errors import ConfigurationError
from clip_server.install import conflict, is_out_of_memory
from clip_server.launch import flow as flows
from clip_server.launch import jina_internals
from clip_server.launch.flow_gateway import DEFAULT_PORTS
from clip_server.launch.overrides import override_encoders
from clip_server.launch.process_setup import (
    bypass_proxies,
    limit_malloc_arenas,
    tolerate_closed_output,
    use_uvloop,
)
from clip_server.runtimes import install_options

# Options that set a parameter of the flow's encoders.
_OVERRIDES = {
    "model": "serve this model; of several encoders, EXECUTOR=NAME chooses the one that gets it",
    "device": "run every encoder on this device, such as cpu, cuda or cuda:1; EXECUTOR=DEVICE: one "
    "of them",
    "dtype": "compute in fp32, fp16, bf16 or int8, of those that the runtime has; EXECUTOR=DTYPE: "
    "in one encoder",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. The exit status: 0 stopped as told, 1 could not start, 2 misused."""
    started = time.perf_counter()
    limit_malloc_arenas()
    bypass_proxies()
    try:
        options = _parse(arguments)
        logs.choose(options.log_level, options.log_format, options.access_log)
        logs.print_as_json()
        if advice := conflict():
            logs.announce(advice, logging.WARNING)
        spec = flows.load(flows.read(options.flow))
        flows.include_executors(spec, options.flow)
        jina_internals.import_jina(without_torch=flows.has_only_encoders(spec))
        use_uvloop()
        from clip_server.launch import server  # imports Jina, which is patched by now

        spec = flows.expand(spec)
        override_encoders(spec, {name: getattr(options, name) for name in _OVERRIDES})
        supervision = flows.supervision(spec)
        return server.run(flows.prepare(spec, options.host, options.port), supervision, started)
    except ConfigurationError as error:
        logs.announce(str(error), logging.ERROR)
        return 1
    except ModuleNotFoundError as error:
        needed = f"the server needs the package {error.name}: {install_options()}"
        logs.announce(needed, logging.ERROR)
        return 1
    except (ImportError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logs.announce(
            "the server does not fit into the memory that it may use: raise its limit (ulimit -v, "
            "which counts address space)",
            logging.ERROR,
        )
        return 1
    except KeyboardInterrupt:
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    ports = ", ".join(f"{port} for {name}" for name, port in DEFAULT_PORTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m clip_server",
        description="Serves CLIP embeddings of texts and images.",
        epilog="The environment variable CLIP_MODEL=NAME sets the model of a built-in flow; "
        "CLIP_MODEL=embedded needs no download, and `python -m clip_server.models` lists the "
        f"others. The default ports are {ports}. If CLIP_AUTH_TOKEN or CLIP_AUTH_FILE "
        "is set, callers need a key. See docs/flows.md and docs/security.md.",
    )
    parser.add_argument(
        "flow",
        nargs="?",
        help=f"a YAML file, or one of the built-in {', '.join(flows.built_in())} "
        f"(default: {flows.DEFAULT_FLOW})",
    )
    parser.add_argument("-i", dest="stdin", action="store_true", help="read the flow from stdin")
    overrides = parser.add_argument_group("options that override the flow")
    overrides.add_argument("--host", help="listen on this address")
    overrides.add_argument(
        "--port",
        nargs="+",
        action="extend",
        default=[],
        help="listen on these ports: one for each protocol, or one that is the first of "
        "consecutive ports; 0: any free port",
    )
    for name, meaning in _OVERRIDES.items():
        metavar = "NAME" if name == "model" else name.upper()
        overrides.add_argument(
            f"--{name}", action="append", default=[], metavar=metavar, help=meaning
        )
    parser.add_argument("--log-level", choices=logs.LEVELS, help="default: info")
    parser.add_argument("--log-format", choices=logs.FORMATS, help="default: text")
    parser.add_argument("--access-log", action="store_true", help="log a line for each request")
    options = parser.parse_args(arguments)
    # In `--port 8000 my.yml` the flow is not one more port.
    if options.port and options.flow is None and not options.port[-1].isdecimal():
        options.flow = options.port.pop()
    if not all(map(_is_port, options.port)):
        parser.error(f"--port: {' '.join(options.port)}: a port is a number from 0 to 65535")
    options.port = [int(port) for port in options.port]
    if options.stdin and options.flow is not None:
        parser.error(f"-i reads the flow from stdin: give either it or {options.flow}")
    options.flow = "-" if options.stdin else options.flow or flows.DEFAULT_FLOW
    return options


def _is_port(word: str) -> bool:
    return word.isdecimal() and int(word) <= 65535


def run() -> NoReturn:
    """Runs the command as this process, and ends it."""
    tolerate_closed_output()
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python itself would clean up for a second, and wait for a process that nothing can kill.
    os._exit(status)


if __name__ == "__main__":
    run()
