"""What is answered in place of what was asked for, in the form of OpenAI's errors."""

from typing import Any

from deploy.gate.rules import Refused

_CODES = {401: "invalid_api_key"}
RETRY_AFTER_S = 2


class Refusal(Exception):
    """status: of HTTP.   param: the request's field it is about.   retry_after_s: when to come again.

    allowed: the methods that the path takes.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        allowed: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after_s, self.allowed = retry_after_s, allowed

    def as_json(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def of_gate(refused: Refused) -> Refusal:
    """What the gate's own rules say, in this form."""
    retry_after_s = RETRY_AFTER_S if refused.status == 503 else None
    return Refusal(refused.status, str(refused), code=_CODES.get(refused.status), retry_after_s=retry_after_s)
