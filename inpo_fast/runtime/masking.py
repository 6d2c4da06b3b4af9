"""Secrets stay out of what is shown or stored: one function, `masked`, at every border.

A secret is what stands before the `@` of an address (`https://user:password@host`), the value of each of its parameters
(`?token=…`, `&sig=…`: signed addresses have many names for them, so all count, but for a few that say which version is
meant), what follows `Bearer`, and every text that `keep_secret` was told. UserErrors, log lines, config.yaml, manifests
and reports go through here.
"""

import logging
import re
import urllib.parse

MASK = "***"
PLAIN_PARAMETERS = ("revision", "version", "versionid", "api-version", "download", "raw", "format", "ref", "page")
USER_ONLY_IS_NAME = ("sftp", "ssh", "hdfs", "smb", "abfs", "abfss", "wasb", "wasbs", "az", "adl", "hf", "webhdfs")
SECRET_NAMES = re.compile(r"key|token|secret|sig|pass|pwd|auth|cred|code|session", re.IGNORECASE)
SHORTEST = 6  # characters of a secret that is looked for wherever it stands: shorter ones are parts of words

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:(?://|\\/\\/)[^\s\"'<>`]+")
_PARAMETER = re.compile(r"([?&;#])([^=&;#?\s]+)=([^&;#\s\"']*)")
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[^\s'\",;]{4,}", re.IGNORECASE)
_told: set[str] = set()


def keep_secret(value: str) -> None:
    """From now on `masked` hides this text wherever it stands in this process, also as an address writes it."""
    for text in (value, urllib.parse.quote(value, safe=""), urllib.parse.unquote(value)):
        if len(text) >= SHORTEST:
            _told.add(text)


def keep_secrets_of(address: str) -> None:
    """The same of all that `masked` hides in an address: a library's message may quote the password alone."""
    for one in address.split("::") if ":/" in address else ():
        place, rest = _split_place(one.partition("://")[2])
        user, at, _ = place.rpartition("@")
        if at and masked_address(one) != one:
            for part in (user, user.partition(":")[2]):
                keep_secret(part)
        for _, name, value in _PARAMETER.findall(rest):
            if name.lower() not in PLAIN_PARAMETERS:
                keep_secret(value)


def masked(text: str) -> str:
    """The text with *** in place of what is secret. What holds no secret comes back as it is."""
    for secret in sorted(_told, key=len, reverse=True):
        text = text.replace(secret, MASK)
    if ":/" in text or ":\\/" in text:
        text = _ADDRESS.sub(lambda found: masked_address(found[0]), text)
    return _BEARER.sub(lambda found: f"{found[1]} {MASK}", text)


def mask_logs() -> None:
    """From now on whatever any library logs is masked: addresses stand in it."""
    logging.setLogRecordFactory(_MaskedRecord)


class _MaskedRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return masked(super().getMessage())


def masked_tree(tree):
    """A copy of dicts, lists and plain values in which every text, names too, is masked."""
    if isinstance(tree, dict):
        return {masked_tree(name): masked_tree(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(masked_tree, tree))
    return masked(tree) if isinstance(tree, str) else tree


def without_secrets(address: str) -> str:
    """What tells one address from another whoever asks: without who logs in, and without the values of parameters whose
    names are those of secrets. Not to be shown."""
    scheme, slashes, rest = address.partition("://")
    place, rest = _split_place(rest)
    keep = lambda found: found[1] + found[2] + ("" if SECRET_NAMES.search(found[2]) else f"={found[3]}")  # noqa: E731
    return scheme + slashes + place.rpartition("@")[2] + _PARAMETER.sub(keep, rest)


def masked_address(address: str) -> str:
    """One address, or several chained by `::` as fsspec does: who logs in and all parameters' values are hidden."""
    return "::".join(map(_masked_one, address.split("::")))


def _masked_one(address: str) -> str:
    scheme, slashes, rest = re.match(r"([A-Za-z0-9+.\-*]*:)?(//|\\/\\/)?(.*)", address, re.DOTALL).groups(default="")
    if slashes:
        place, rest = _split_place(rest)
        user, at, host = place.rpartition("@")
        if at and (":" in user or scheme[:-1].lower() not in USER_ONLY_IS_NAME):
            place = f"{MASK}@{host}"
        rest = place + rest
    return scheme + slashes + _PARAMETER.sub(_masked_parameter, rest)


def _split_place(rest: str) -> tuple[str, str]:
    """`user:password@host:port` and what follows. A password may have / ? # in it, which is no address but is typed."""
    place = re.match(r"[^/\\?#]*", rest)[0]
    after = place.rpartition("@")[2].partition(":")
    if "@" not in place and after[1] and not after[2].isdigit() and "@" in rest:
        end = rest.rindex("@")
        place = rest[: end + 1] + re.match(r"[^/\\?#]*", rest[end + 1 :])[0]
    return place, rest[len(place) :]


def _masked_parameter(found: re.Match) -> str:
    before, name, value = found.groups()
    return found[0] if name.lower() in PLAIN_PARAMETERS or not value else f"{before}{name}={MASK}"
