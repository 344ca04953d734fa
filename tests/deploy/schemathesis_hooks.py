"""Loaded by schemathesis, in an environment of its own: what no request may be answered with."""

import schemathesis


@schemathesis.check
def only_meant_answers(ctx, response, case) -> None:
    """No error of the server's, but for 503 that says when to come again."""
    if response.status_code < 500:
        return
    assert response.status_code == 503, f"status {response.status_code}: {response.text[:500]}"
    assert "retry-after" in response.headers
