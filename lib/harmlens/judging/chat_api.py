"""One question to a model behind a chat-completions address, without an extra dependency.

Many providers and local servers (vLLM, SGLang, llama.cpp, Ollama) understand the format. The key is read from
an environment variable when a question is asked. It is never an argument, never stored and never printed.

Introduced in book/judging ("Judging answers").
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

URL = "https://api.openai.com/v1/chat/completions"
KEY = "OPENAI_API_KEY"
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # answers that a second try may mend
_LOCAL = ("localhost", "127.0.0.1", "::1")

Transport = Callable[[str, Mapping[str, str], bytes], bytes]


def send(url: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """POST a body and give back the body of the reply."""
    request = urllib.request.Request(url, data=body, headers=dict(headers), method="POST")
    with urllib.request.urlopen(request, timeout=120) as reply:
        return reply.read()


def ask(
    model: str,
    question: str,
    *,
    url: str = URL,
    key_variable: str = KEY,
    tries: int = 5,
    transport: Transport = send,
    sleep: Callable[[float], Any] = time.sleep,
) -> str:
    """The model's reply to one user message, at temperature 0.

    Args:
        url: whole address of the endpoint; ``https``, or ``http`` on this machine.
        key_variable: environment variable that holds the key; a server on this machine needs none.
        tries: how often to ask; the pause doubles from one second on.
        transport: sends the request; tests put their own here.

    Raises:
        ValueError: an address that would send the key in the open, or ``tries`` below 1.
        RuntimeError: no key, the endpoint said no, or no try succeeded; the message says what to do.
    """
    parts = urlsplit(url)
    local = parts.hostname in _LOCAL
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise ValueError(f"url={url!r} must begin with https:// (http:// only for a server on this machine)")
    if tries < 1:
        raise ValueError(f"tries={tries} must be at least 1")
    key = os.environ.get(key_variable, "").strip()
    if not key and not local:
        raise RuntimeError(
            f"the API judge needs a key in the environment variable {key_variable}, which is not set. Set "
            "it, or choose a judge that runs here: 'prefixes', 'strongreject' or 'guard'."
        )
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    message = {"role": "user", "content": question}
    body = json.dumps({"model": model, "messages": [message], "temperature": 0}).encode()
    trouble = ""
    for attempt in range(tries):
        if attempt:
            sleep(2.0 ** (attempt - 1))
        try:
            reply = json.loads(transport(url, headers, body))
            return str(reply["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            trouble = f"HTTP {error.code} {error.reason}"
            if error.code not in _PASSING:
                raise RuntimeError(
                    f"{parts.hostname} refused the request to model {model!r}: {trouble}. Check the model's "
                    f"name, the address and the key in {key_variable}."
                ) from None
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:  # no network, or no reply
            trouble = f"{type(error).__name__}: {error}"
    raise RuntimeError(
        f"{parts.hostname} gave no usable reply in {tries} tries ({trouble}). Try again later: what was "
        "graded so far is kept."
    )
