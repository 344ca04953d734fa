"""Single HTTP requests for files: a GET of a file or a part of it, a PUT of one, redirects checked before each hop.

Rules of ranges and of their headers: RFC 9110, sections 13.1.5 and 14.
"""

import contextlib
import functools
import logging
import re
import ssl
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

import httpx

from alpaca.errors import AlpacaError, InputError, MissingInput
from alpaca.files.network.addresses import SCHEMES, Address, parse_address, split_address
from alpaca.files.network.retries import InterruptedTry

_TIMEOUT_S = 30.0  # to connect, and between two pieces
_STORING_S = 600.0  # for an upload's answer: some servers store or copy the whole file first
_MOST_REDIRECTS = 10
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses of a server that may answer otherwise soon
_NO_LENGTH = "the server's Content-Length is no number of bytes"

# httpcore logs requests with their headers: passwords and signed tokens would stand in the log.
logging.getLogger("httpcore").setLevel(logging.WARNING)


class RangeRefused(Exception):
    """The server has no such part of the file. size: of the whole file in bytes, where the server says it."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size = size


@contextlib.contextmanager
def open_reply(
    address: Address,
    headers: dict[str, str],
    *,
    body: Iterator[bytes] | None = None,
    may_follow: Callable[[Address], bool] = lambda target: True,
) -> Iterator[httpx.Response]:
    """GET the file or a part of it, or PUT `body`; the reply is 2xx and its content not read yet.

    may_follow: whether a redirect may lead to an address.
    Raises InterruptedTry for what may pass, RangeRefused, InputError for a redirect or certificate that is refused,
    MissingInput for other answers.
    """
    asked = {"Accept-Encoding": "identity", "User-Agent": "cog-alpaca", **headers}
    if address.authorization:
        asked["Authorization"] = address.authorization
    url = address.url
    for _ in range(_MOST_REDIRECTS + 1):
        with _send(address, url, asked, body) as reply:
            location = reply.headers.get("Location", "")
            if not reply.has_redirect_location:
                _check_status(address, reply)
                yield reply
                return
            target = _check_redirect(url, location)
            if not may_follow(parse_address(target)):
                raise InputError(f"{address} redirects to {parse_address(target)}, which is not allowed")
            if body is not None:  # its pieces are spent
                _check_status(address, reply)
        url = target
        asked.pop("Authorization", None)  # a password stays with the host it was given for
    raise MissingInput(f"{address}: more than {_MOST_REDIRECTS} redirects; check the address")


@contextlib.contextmanager
def _send(
    address: Address, url: str, headers: dict[str, str], body: Iterator[bytes] | None
) -> Iterator[httpx.Response]:
    """One request without following redirects; the reply's content is left to be read."""
    timeout = httpx.Timeout(_TIMEOUT_S, read=_STORING_S if body else _TIMEOUT_S, write=_STORING_S)
    with _make_transport(url) as transport:
        try:
            extensions = {"timeout": timeout.as_dict()}
            request = httpx.Request("PUT" if body else "GET", url, headers=headers, content=body, extensions=extensions)
            reply = transport.handle_request(request)
        except AlpacaError:  # of the body's own code: a ValueError, too
            raise
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise _explain_failure(address, error) from None
        reply.request = request
        with contextlib.closing(reply):
            yield reply


def _make_transport(url: str) -> httpx.HTTPTransport:
    """A connection with the system's certificates and, for http and https, the proxy that the environment names.

    Not httpx.Client: it judges redirects by rules of its own before ours are asked, it logs whole addresses, and it
    would also take ALL_PROXY, and fail for one of the kind SOCKS.
    """
    return httpx.HTTPTransport(trust_env=False, verify=_load_certificates(), proxy=_find_proxy(url))


@functools.cache
def _load_certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


def _find_proxy(url: str) -> str | None:
    """The proxy that http_proxy, https_proxy and no_proxy name for an address. Raises InputError for a SOCKS proxy."""
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return None
    scheme, found, _ = proxy.partition("://")
    if found and scheme not in SCHEMES:
        raise InputError(
            f"{parts.scheme}_proxy: expected an http or https proxy, found one of the scheme {scheme[:20]!r}; set "
            "another, or exempt the host with no_proxy"
        )
    return proxy if found else f"http://{proxy}"


def _check_redirect(url: str, location: str) -> str:
    """The address to follow. Raises InputError for one that is none, or leads from https to another scheme."""
    here, scheme_here = parse_address(url), urllib.parse.urlsplit(url).scheme
    schemes = ("https",) if scheme_here == "https" else SCHEMES
    try:
        target = urllib.parse.urljoin(url, location)
        scheme = urllib.parse.urlsplit(target).scheme
    except ValueError:
        raise InputError(f"{here} redirects to what is no address; the server is at fault, or the address") from None
    if scheme not in schemes:
        raise InputError(
            f"{here} redirects to an address of the scheme {scheme!r}; from there only {' and '.join(schemes)} may "
            "follow"
        )
    try:
        parts = split_address(target)
    except InputError as error:
        raise InputError(f"{here} redirects elsewhere: {error}") from error
    return parse_address(urllib.parse.urlunsplit(parts._replace(fragment=""))).url


# Failures -------------------------------------------------------------------------------------------------------


def _explain_failure(address: Address, error: Exception) -> Exception:
    """The error for a request that got no reply. httpx's messages are not shown where they may quote the address."""
    causes = list(_causes(error))
    if refused := next((cause for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)), None):
        return InputError(f"{address}: its certificate is not valid here ({refused.verify_message})")
    if isinstance(error, httpx.InvalidURL):
        return InputError(f"{address}: the address cannot be asked for; check it")
    if isinstance(error, ValueError) or "Content-Length" in str(error):  # of a length with too many digits to read
        return InterruptedTry(_NO_LENGTH)
    said = next((cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), None)
    return InterruptedTry(f"no connection ({said or type(error).__name__})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those it was raised from or while handling, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _check_status(address: Address, reply: httpx.Response) -> None:
    """Raise InterruptedTry, RangeRefused or MissingInput for a status other than 2xx."""
    status = reply.status_code
    if reply.is_success:
        return
    if status == 416:
        size = re.fullmatch(r"bytes \*/([0-9]{1,18})", reply.headers.get("Content-Range", ""))
        raise RangeRefused(int(size[1]) if size else None)
    if status in _TEMPORARY:
        raise InterruptedTry(f"the server answered HTTP {status}")
    advice = "check the address"
    if status in (401, 403):
        advice = "check its password or token; a signed address ends at its time"
    raise MissingInput(f"{address}: the server answered HTTP {status}; {advice}")


# Reading a reply ------------------------------------------------------------------------------------------------


def iterate_pieces(reply: httpx.Response) -> Iterator[bytes]:
    """The reply's content as it arrives. Raises InterruptedTry when the connection breaks.

    A reply that ends before its Content-Length is no error here: the caller compares what came with what should.
    """
    try:
        yield from reply.iter_raw()
    except httpx.RemoteProtocolError as error:
        if read_length(reply) is None:
            raise InterruptedTry(f"the connection broke ({type(error).__name__})") from None
    except httpx.HTTPError as error:
        raise InterruptedTry(f"the connection broke ({type(error).__name__})") from None


def read_length(reply: httpx.Response) -> int | None:
    """Content-Length in bytes, None without one. Raises InterruptedTry for one that is no number."""
    text = reply.headers.get("Content-Length", "")
    if text and not re.fullmatch(r"[0-9]{1,18}", text):
        raise InterruptedTry(_NO_LENGTH)
    return int(text) if text else None


def read_range(reply: httpx.Response) -> tuple[int, int | None]:
    """Content-Range of a partial reply: the number of its first byte, and the size of the whole file in bytes.

    Raises InterruptedTry without such a header.
    """
    match = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", reply.headers.get("Content-Range", ""))
    if not match:
        raise InterruptedTry("the server sent a part of the file without saying which")
    return int(match[1]), int(match[2]) if match[2].isdigit() else None
