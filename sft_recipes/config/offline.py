"""Whether a run needs the hub and can reach it, asked before the hub's client is imported."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from sft_recipes.config.schema import Config


def needs_hub(config: Config) -> bool:
    """Whether the model or a source is neither a folder here nor one of datasets' builders: a name of the hub's."""
    names = [config.model.id, *(source.path for source in config.sources.values() if "/" in (source.path or ""))]
    return any(not Path(name).exists() for name in names)


def hub_is_reachable() -> bool:
    """Whether the hub's name is known here; behind a proxy only the proxy knows."""
    # the name is looked up and nothing asked: a run whose files are all in the cache sends no request
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname, 443))
    except OSError:
        return False
