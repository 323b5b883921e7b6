"""Errors in the API's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math

from fastapi.responses import JSONResponse

from accelerate_tts.errors import printable


class Problem(Exception):  # noqa: N818 - an answer; `Failed` reads better than `FailedError`
    """An error that the caller is told.

    Args:
        message: What is wrong, and what to do.
        param: Name of the field that is wrong, or `None`.
        code: The API's short name of the error.
        retry_after: Seconds after which the caller may try again, or `None`.
    """

    status = 500
    type = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The answer's body."""
        # Foreign texts in the message may have characters that JSON's encoder or a terminal cannot take.
        return {"error": {"message": printable(self), "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return JSONResponse(self.body, self.status, headers)


class BadRequest(Problem):
    """The request is wrong."""

    status = 400
    type = "invalid_request_error"


def bad_request(message: str, param: str | None, code: str | None = None, status: int = 400) -> BadRequest:
    """Return an error of the caller, with a status from 400 to 499."""
    problem = BadRequest(message, param=param, code=code)
    problem.status = status
    return problem


class Busy(Problem):
    """Too many requests are in the service."""

    status = 429
    type = "rate_limit_error"


class Unavailable(Problem):
    """The service cannot answer now, and could later."""

    status = 503


class TimedOut(Problem):
    """The speech was not complete in time."""

    status = 504


class Failed(Problem):
    """The model or its process failed."""
