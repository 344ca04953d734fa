"""Which requests pass: routes, hosts, keys, ids, webhooks and sizes. Decides alone by what it is given."""

import hmac
import ipaddress
import json
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

from alpaca.errors import InputError
from alpaca.files.names import quote_name
from alpaca.files.network.addresses import parse_address

MOST_PREDICTION_BYTES = 8 << 20
MOST_TRAINING_BYTES = 100 << 20  # the runtime's own limit
_MOST_CONTEXT_BYTES = 64 << 10  # beside an input it goes to the worker in one message, which has a bound
_MOST_WEBHOOK_CHARACTERS = 2048
_EVENTS = ("start", "output", "logs", "completed")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PASSED = ("id", "input", "context", "webhook", "webhook_events_filter")  # of a body; the rest has no meaning here
_LOCAL = ("localhost", "localhost.localdomain", "ip6-localhost")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the operator allows.

    hosts: names under which clients reach the server, beside addresses in numbers and localhost.
    keys: one of them must come as `Authorization: Bearer KEY`; none: no key is asked for.
    webhooks: addresses the runtime may post to; one that ends in a slash stands for all below it.
    serves_training: /trainings instead of /predictions.
    """

    hosts: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    webhooks: tuple[str, ...] = ()
    serves_training: bool = False

    @property
    def resource(self) -> str:
        return "trainings" if self.serves_training else "predictions"

    @property
    def most_bytes(self) -> int:
        return MOST_TRAINING_BYTES if self.serves_training else MOST_PREDICTION_BYTES


class Refused(Exception):
    """A request that does not pass. status: of HTTP. allow: with 405, the methods that the path has."""

    def __init__(self, status: int, message: str, *, allow: str = "") -> None:
        super().__init__(message)
        self.status, self.allow = status, allow


@dataclass(frozen=True, kw_only=True)
class Route:
    """What a request asks for. kind: "look" (a GET), "start" (a prediction or training), "cancel"."""

    kind: str
    path: str
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Body:
    """What a client asks to have done.

    content: as the runtime gets it. webhook_at_end: whether the webhook, if there is one, is to hear of the end.
    """

    content: bytes
    id: str | None = None
    webhook: str | None = None
    webhook_at_end: bool = False


def find_route(method: str, path: str, rules: Rules) -> Route:
    """The route of a request, where it is one that clients are meant to have. Raises Refused."""
    looks = ("/", "/health-check", "/openapi.json")
    if path in looks:
        if method not in ("GET", "HEAD"):
            raise Refused(405, f"{path} is read with GET", allow="GET, HEAD")
        return Route(kind="look", path=path)
    name, _, rest = path.removeprefix("/").partition("/")
    if name != rules.resource or path.endswith("/"):
        raise Refused(404, f"no such route; there are {', '.join(looks)} and /{rules.resource}")
    given, _, action = rest.partition("/")
    if rest and not _ID.fullmatch(given):
        raise Refused(422, "an id has 1 to 64 letters, digits, _, - and ., and begins with a letter or digit")
    if not rest and method == "POST":
        return Route(kind="start", path=path)
    if rest and not action and method == "PUT":
        return Route(kind="start", path=path, id=given)
    if action == "cancel" and method == "POST":
        return Route(kind="cancel", path=path, id=given)
    expected = f"POST /{name}, PUT /{name}/ID or POST /{name}/ID/cancel"
    if action not in ("", "cancel"):
        raise Refused(404, f"no such route; expected {expected}")
    raise Refused(405, f"expected {expected}", allow="PUT" if rest and not action else "POST")


def check_sender(headers: Mapping[str, str], route: Route, rules: Rules) -> None:
    """Refuse what comes from another site's page in a browser, and who has no key. headers: names in lower case."""
    if not _is_known(headers.get("host", ""), rules):
        raise Refused(
            403,
            f"this server is not known as {quote_name(headers.get('host', ''))}: start it with --allowed_hosts NAME",
        )
    origin = headers.get("origin")
    if origin is not None and not _is_own_page(origin, headers.get("host", ""), rules):
        raise Refused(403, f"a page of {quote_name(origin)} may not use this server")
    if route.path != "/health-check" and not has_key(headers, rules):
        raise Refused(401, "this server asks for a key: send Authorization: Bearer KEY")


def _is_known(host: str, rules: Rules) -> bool:
    """Whether a Host header names this server. An address in numbers cannot be pointed elsewhere by a name server."""
    name = _host_name(f"//{host}")
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return _is_named(name, rules)


def _is_own_page(origin: str, host: str, rules: Rules) -> bool:
    """Whether a page is this server's own, of this machine, or of a host that the operator names.

    An address in numbers alone does not do: any site may be reached by one.
    """
    scheme, _, netloc = origin.partition("://")
    return scheme in ("http", "https") and (
        netloc.lower() == host.lower() or _is_named(_host_name(f"//{netloc}"), rules)
    )


def _is_named(name: str, rules: Rules) -> bool:
    return name in (*_LOCAL, *(_host_name(f"//{allowed}") for allowed in rules.hosts))


def _host_name(text: str) -> str:
    """The host of `//host:port` in lower case; "" where there is none."""
    try:
        return urllib.parse.urlsplit(text).hostname or ""
    except ValueError:
        return ""


def has_key(headers: Mapping[str, str], rules: Rules) -> bool:
    """Whether a request may see what only those may who have a key; where none is asked for, everyone."""
    return not rules.keys or _is_key(headers.get("authorization", ""), rules.keys)


def _is_key(authorization: str, keys: tuple[str, ...]) -> bool:
    scheme, _, given = authorization.partition(" ")
    key_given = given.strip().encode("latin-1")  # the bytes that came
    is_right = [hmac.compare_digest(key_given, key.encode()) for key in keys]  # all, whichever is right
    return scheme.lower() == "bearer" and any(is_right)


def check_body(content: bytes, rules: Rules) -> Body:
    """The body that the runtime gets: the fields it knows, once each. Raises Refused."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise Refused(400, 'expected a JSON object such as {"input": {"prompt": "…"}}; this is no JSON') from None
    if not isinstance(body, dict):
        raise Refused(422, 'expected a JSON object such as {"input": {"prompt": "…"}}')
    given = body.get("id")
    if given is not None and (not isinstance(given, str) or not _ID.fullmatch(given)):
        raise Refused(422, "an id has 1 to 64 letters, digits, _, - and ., and begins with a letter or digit")
    if body.get("webhook") is not None:
        body["webhook"] = _check_webhook(body["webhook"], rules)
    events = body.get("webhook_events_filter")
    if events is not None:
        body["webhook_events_filter"] = events = _check_events(events)
    if "context" in body:
        _check_context(body["context"])
    return Body(
        content=json.dumps({name: body[name] for name in _PASSED if name in body}).encode(),
        id=given,
        webhook=body.get("webhook"),
        webhook_at_end=events is None or "completed" in events,
    )


def _check_events(events: object) -> list[str]:
    """Those that the webhook gets, once each."""
    if not isinstance(events, list) or any(event not in _EVENTS for event in events):
        raise Refused(422, f"webhook_events_filter: expected a list of {', '.join(_EVENTS)}")
    return [event for event in _EVENTS if event in events]


def _check_context(context: object) -> None:
    """What goes to the model's code beside the input. The runtime itself has no bound to it."""
    if not isinstance(context, dict) or not all(isinstance(value, str) for value in context.values()):
        raise Refused(422, "context: expected an object whose values are texts")
    text = json.dumps(context, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode("utf-8", errors="surrogatepass")) > _MOST_CONTEXT_BYTES:
        raise Refused(
            413, f"context may have {_MOST_CONTEXT_BYTES >> 10} KiB as JSON; what the model is to read goes into input"
        )


def _check_webhook(webhook: object, rules: Rules) -> str:
    """The address as the runtime gets it: taken apart and put together here, as it may read the original otherwise."""
    if isinstance(webhook, str) and len(webhook) > _MOST_WEBHOOK_CHARACTERS:
        raise Refused(422, f"webhook: an address may have {_MOST_WEBHOOK_CHARACTERS:,} characters")
    if not isinstance(webhook, str) or "\\" in webhook or not webhook.isprintable() or " " in webhook:
        raise Refused(422, "webhook must be an address without backslashes and spaces")
    try:
        address = parse_address(webhook)
        is_listed = address.is_within(rules.webhooks)
    except InputError as error:
        raise Refused(422, f"webhook: {error}") from None
    if not is_listed or address.authorization:
        raise Refused(
            422, "webhook: the operator of this server does not allow this address: start it with --webhooks ADDRESS/"
        )
    return address.url
