"""Addresses of files: taken apart, checked before they are used, and shown without what is secret in them.

Passwords and signed tokens are parts of addresses, so logs and errors show scheme, host and path alone. An address may
end in `#sha256=…`, the digest its file must have.
"""

import base64
import ipaddress
import re
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass

from alpaca.errors import InputError

SCHEMES = ("http", "https")
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?=.{1,254}\Z)([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?")


def is_address(text: str) -> bool:
    """Whether `text` is meant as an address, of any scheme, rather than a path."""
    return "://" in text


@dataclass(frozen=True, kw_only=True)
class Address:
    """An address taken apart.

    url: without user, password and fragment.    authorization: the Authorization header that user and password make.
    sha256: the digest that the file must have, in lower-case hexadecimal.
    """

    url: str
    authorization: str | None
    sha256: str | None

    def __str__(self) -> str:
        """Scheme, host and path: the parts that may be shown."""
        parts = urllib.parse.urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"

    __repr__ = __str__

    def is_within(self, allowed: Iterable[str]) -> bool:
        """Whether the address is one of `allowed`, or below one that ends in a slash. Raises InputError for others.

        Scheme, host and port must be equal, and no part of the path may lead up.
        """
        own = urllib.parse.urlsplit(self.url)
        if ".." in urllib.parse.unquote(own.path).split("/"):
            return False
        for entry in allowed:
            listed = urllib.parse.urlsplit(parse_address(entry).url)
            is_below = own.path.startswith(listed.path) if listed.path.endswith("/") else own.path == listed.path
            if _server(own) == _server(listed) and is_below:
                return True
        return False

    @property
    def label(self) -> str:
        """The last part of the path, made safe as the name of a file; "file" where the path has none."""
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.url).path.rpartition("/")[2])
        return re.sub(r"[^A-Za-z0-9._-]", "_", name)[-60:].strip(".") or "file"


def _server(parts: urllib.parse.SplitResult) -> tuple[str, str | None, int]:
    return parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme]


def split_list(text: str) -> tuple[str, ...]:
    """The entries of a setting that lists several, separated by commas."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def parse_address(text: str) -> Address:
    """Take an address apart. Raises InputError for another scheme, no valid host, or a fragment that is no digest."""
    parts = split_address(text.strip())
    digest = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", parts.fragment)
    if parts.fragment and not digest:
        raise InputError(f"after # in an address: expected sha256= and 64 hexadecimal digits, found {parts.fragment!r}")
    user, _, host = parts.netloc.rpartition("@")
    authorization = None
    if user:
        encoded = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
        authorization = f"Basic {encoded}"
    path = urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    url = urllib.parse.urlunsplit((parts.scheme.lower(), host, path, query, ""))
    return Address(url=url, authorization=authorization, sha256=digest[1].lower() if digest else None)


def split_address(text: str) -> urllib.parse.SplitResult:
    """Take an address apart and check that its host and port are valid.

    Raises InputError, which shows no part of the address: a password with a slash in it ends the host too early, so
    that the supposed host or path may be a piece of the password.
    """
    scheme = text.partition(":")[0]
    if scheme.lower() not in SCHEMES:
        raise InputError(f"expected an http or https address, found the scheme {scheme[:20]!r} and no more is shown")
    try:
        text.encode()
        parts = urllib.parse.urlsplit(text)
        host, wrong = parts.hostname or "", parts.port == 0
    except ValueError:  # brackets, an invalid port, lone surrogates; the error's own words quote the address
        host, wrong = "", True
    if wrong or not _is_host(host):
        raise InputError(
            "expected an http or https address with a host such as example.com, 10.0.0.5:8000 or [::1], found none "
            "that is valid (the address is not shown: it may hold a password). International names are written as "
            "xn--…; in a password / is %2F, @ is %40, # is %23 and ? is %3F"
        )
    return parts


def _is_host(text: str) -> bool:
    if ":" not in text:
        return bool(_HOST.fullmatch(text))
    try:
        return bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False
