"""The images' health check: exit status 0 while the server of this container takes requests."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 4


def main() -> int:
    """Ask `/health/ready`; what it says goes to the container's health log."""
    url = f"http://127.0.0.1:{os.environ.get('TRIMKV_PORT') or 8000}/health/ready"
    try:
        # No proxy of the environment stands between a container and itself.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=TIMEOUT_SECONDS) as answer:
            said, status = answer.read(), 0
    except urllib.error.HTTPError as error:
        said, status = error.read(), 1
    except OSError as error:
        said, status = f"{url}: {error}".encode(), 1
    sys.stdout.write(said.decode(errors="replace") + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
