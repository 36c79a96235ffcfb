"""TorchServe's REST calls: one session, timeouts, tokens, and its refusals as ours. Only `client.Client` uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import requests

from marwright.errors import ServerUnreachable
from marwright.release import answers
from marwright.release.patience import Patience
from marwright.release.properties import ServerConfig
from marwright.release.tokens import Kind, Tokens

Port = Literal["inference", "management", "metrics"]

_CONNECT_SECONDS = 5.0


class RestApi:
    """Connections to the three HTTP ports, kept open between calls."""

    def __init__(
        self,
        config: ServerConfig,
        tokens: Tokens | None,
        *,
        timeout: float,
        patience: Patience | None = None,
        told: Callable[[str], object] | None = None,
    ) -> None:
        self._config = config
        self._patience = patience
        self._told = told
        self._tokens = tokens
        self._timeout = timeout
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between us and loopback, and no .netrc in place of the token

    def close(self) -> None:
        self._session.close()

    def call(
        self,
        method: str,
        port: Port,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        **request: Any,
    ) -> requests.Response:
        """One call, insisted on where it is not a prediction and not a POST.

        ServerRefused for every status from 400 on; ServerUnreachable when nobody answers, or not in time.
        """

        def once() -> requests.Response:
            if self._told is not None:
                self._told(f"{method} {path}")
            return self._once(method, port, path, headers, timeout, request)

        if self._patience is None or port == "inference" or method == "POST":
            return once()
        return self._patience.insist(once)

    def _once(
        self,
        method: str,
        port: Port,
        path: str,
        headers: Mapping[str, str] | None,
        timeout: float | None,
        request: Mapping[str, Any],
    ) -> requests.Response:
        """One call, and a second one when the token was refused and there is a better one."""
        url = getattr(self._config, f"{port}_url") + path
        kind: Kind = "management" if port == "management" else "inference"
        token = self._tokens.key(kind) if self._tokens else None
        response = self._send(method, url, token, headers, timeout, request)
        if response.status_code == 400 and self._tokens and token and b"InvalidKeyException" in response.content:
            better = self._tokens.after_refusal(kind, token)
            if better is not None:
                response = self._send(method, url, better, headers, timeout, request)
        if response.status_code >= 400:
            key_file = str(self._tokens.key_file) if self._tokens else "key_file.json"
            answers.raise_refusal(f"{method} {url}", response.status_code, response.content, key_file=key_file)
        return response

    def _send(
        self,
        method: str,
        url: str,
        token: str | None,
        headers: Mapping[str, str] | None,
        timeout: float | None,
        request: Mapping[str, Any],
    ) -> requests.Response:
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        limit = timeout or self._timeout
        try:
            return self._session.request(
                method,
                url,
                headers=sent,
                timeout=(min(limit, _CONNECT_SECONDS), limit),
                allow_redirects=False,
                **request,
            )
        except requests.ReadTimeout as error:
            raise ServerUnreachable(
                f"{method} {url}: no answer within {limit:g} s",
                hint="`make status` shows whether workers are ready; a request can be given more time",
            ) from error
        except requests.RequestException as error:
            if len(request.get("data") or b"") > self._config.max_request_size:  # it hangs up while we are sending
                answers.raise_refusal(f"{method} {url}", 413, b"the request is larger than max_request_size")
            raise ServerUnreachable(
                f"{method} {url}: nobody answers: {error}", hint="`make serve` starts the server"
            ) from error
