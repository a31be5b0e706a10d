"""Serve a model and its adapters on this machine, until Ctrl-C.

    python -m serving lora_path=runs/NAME-HASH/adapter port=8000
    python -m serving base_model=smollm2-135m rope_2d_ratio=0 visibility=isolated max_replicas=2

A page to try it is at /, an OpenAI-compatible interface under /v1, Prometheus metrics at /metrics.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from parallelmind import cli
from parallelmind.errors import UserError
from parallelmind.hardware import available_cpus, num_gpus
from serving.config import AppConfig, NetworkConfig, ServedModelConfig, ServerConfig
from serving.ingress.api_keys import read_api_keys
from serving.ingress.hosts import is_loopback
from serving.runtime.ray_env import preload_tcmalloc, set_serve_env

# Little is stored there. Ray's default, 30% of the memory, is more than the shared memory of most containers.
_OBJECT_STORE_BYTES = 2**28


def main(argv: list[str]) -> None:
    """Serve until interrupted.

    Raises UserError for wrong fields, a port in use, and what cannot be read or loaded.
    """
    if cli.wants_help(argv):
        return cli.print_help(__doc__ or "", ServerConfig)
    config = cli.parse(ServerConfig, argv)
    _require_keys_beyond_loopback(config.network.host, read_api_keys(config.access.api_keys_file))
    _require_free_port(config.network)
    _check_model(config.model)
    set_serve_env(config.network.proxy)  # before Ray is imported
    if library := preload_tcmalloc():
        print(f"engines allocate memory with {library}; LD_PRELOAD= in the environment prevents it")
    import ray

    try:
        _start(config)
        print(_greeting(config), flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        _on_stop_signal(signal.SIG_IGN)  # a second Ctrl-C would leave processes of Ray behind
        with redirect_stderr(StringIO()):  # Serve's controller logs errors when its cluster ends
            ray.shutdown()  # ends Serve too: the cluster has no other user
    return None


def _start(config: ServerConfig) -> None:
    import ray
    from ray import serve

    from serving.app import build

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray.init(
        "local",
        num_cpus=available_cpus(),
        num_gpus=num_gpus(),
        include_dashboard=False,
        logging_level=logging.WARNING,
        object_store_memory=_OBJECT_STORE_BYTES,
    )
    _on_stop_signal(signal.default_int_handler)  # after Ray, which installs a handler of its own
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    serve.start(http_options={"host": config.network.host, "port": config.network.port}, logging_config=quiet)
    app_fields = AppConfig.flat_fields()
    fields = {name: value for name, value in config.model_dump().items() if name in app_fields}
    try:
        serve.run(build(fields), logging_config=quiet)
    except RuntimeError as error:
        # Serve reports the exception of a deployment as the text of its traceback.
        messages = re.findall(r"UserError: (.+)", str(error))
        if messages:
            raise UserError(messages[-1]) from error
        raise


def _on_stop_signal(handler: Any) -> None:
    """Set the handler of Ctrl-C, which a shell may have disabled for background jobs, and of `kill`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _require_keys_beyond_loopback(host: str, keys: Sequence[str]) -> None:
    if not keys and not is_loopback(host):
        raise UserError(
            f"host={host}: other machines reach it, and there are no API keys; set api_keys_file or "
            "$PARALLELMIND_API_KEYS, or give host=127.0.0.1"
        )


def _require_free_port(network: NetworkConfig) -> None:
    host, port = network.host, network.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            raise UserError(f"host={host}: {error.strerror}; give an IPv4 address") from error
        except OSError as error:
            raise UserError(
                f"port={port}: {error.strerror}; give another, such as port={port + 1}"
            ) from error


def _check_model(model: ServedModelConfig) -> None:
    """Raise UserError for a model or an adapter that cannot be loaded, before Ray starts."""
    from parallelmind.model.preflight import check_model  # takes a second: not for --help

    settings = model.model_dump(include={"rope_2d_ratio", "visibility"}, exclude_none=True)
    check_model(model.base_model, model.lora_path, None, settings)


def _greeting(config: ServerConfig) -> str:
    body: dict[str, Any] = {
        "model": config.model.name,
        "prompt": ["The sky is", "The sea is"],
        "max_tokens": 16,
        "temperature": 0,
    }
    host = "127.0.0.1" if config.network.host == "0.0.0.0" else config.network.host
    url = f"http://{host}:{config.network.port}"
    return (
        f"serving {config.model.name} at {url}/v1, with a page to try it at {url} (Ctrl-C stops it). "
        "Two branches of one sample:\n"
        f"  curl {url}/v1/completions -H 'content-type: application/json' -d '{json.dumps(body)}'"
    )


if __name__ == "__main__":
    cli.run(main)
