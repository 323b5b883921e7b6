"""Start the service: `python -m service` in the folder `examples`."""

from __future__ import annotations

import logging

import uvicorn

from service.api import create_app
from service.options import parse


def main() -> None:
    """Serve until SIGTERM or SIGINT; running answers are finished first."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    uvicorn.run(
        create_app(options),
        host=options.host,
        port=options.port,
        timeout_graceful_shutdown=int(options.shutdown_seconds),
        server_header=False,
    )


if __name__ == "__main__":
    main()
