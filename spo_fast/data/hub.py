"""Whether the Hugging Face hub can be asked, known within seconds."""

from __future__ import annotations

import functools
import http.client
import threading
import urllib.request

PROBE_SECONDS = 3.0
"""How long the hub may take to answer before a process calls itself offline."""


@functools.cache
def offline_reason() -> str | None:
    """None when the hub answers, else why not. Asked once a process: one request, no retries, PROBE_SECONDS at most."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answered = threading.Event()
    # a thread, since the timeout of a request does not cover the look-up of its host's name
    probe = threading.Thread(target=_knock, args=(constants.ENDPOINT, answered), daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return None if answered.is_set() else "the hub cannot be reached"


def _knock(url: str, answered: threading.Event) -> None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # any answer is an answer
    except (OSError, ValueError, http.client.HTTPException):
        return
    answered.set()
