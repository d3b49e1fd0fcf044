"""Who may ask: bearer tokens of two roles, of which only salted hashes are kept.

A token is `<name>.<secret>`. The secret has 256 random bits, so a fast hash keeps it: there is nothing to guess. `read`
may ask everything that is answered at once; `admin` may also start jobs.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

ROLES = ("read", "admin")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Entry:
    """One token as the file keeps it."""

    name: str
    role: str
    salt: str  # 16 bytes in hexadecimal
    sha256: str  # of salt and secret, in hexadecimal


class Tokens:
    """The tokens of a file, read again when it changes, so that a removed one stops working at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._entries: dict[str, Entry] = {}
        self._load()

    def role(self, token: str) -> str | None:
        """Return the role of a token, None for one that is not valid. The time taken does not tell how much fits."""
        self._load()
        name, _, secret = token.partition(".")
        entry = self._entries.get(name)
        salt = entry.salt if entry else "00" * 16
        same = hmac.compare_digest(_digest(salt, secret), entry.sha256 if entry else "")
        return entry.role if entry and same else None

    def _load(self) -> None:
        found = self.path.stat()
        stamp = (found.st_mtime_ns, found.st_size)
        if stamp != self._stamp:
            self._entries = {entry.name: entry for entry in read_entries(self.path)}
            self._stamp = stamp


def read_entries(path: Path) -> list[Entry]:
    """Return the tokens of a file. ValueError naming what is wrong with it."""
    try:
        entries = [Entry(**one) for one in json.loads(path.read_text())]
    except (TypeError, ValueError) as error:
        raise ValueError(f"token file {path} is not one that `serve.py token` made: {error}") from error
    wrong = [entry.name for entry in entries if entry.role not in ROLES]
    if wrong:
        raise ValueError(f"token {wrong[0]!r} in {path} has no known role: one of {', '.join(ROLES)}")
    return entries


def add_token(path: Path, name: str, role: str) -> str:
    """Add a token to a file, made if need be, readable by its owner alone, and return it: it is shown only now.

    ValueError for a name in use or of other characters than letters, digits, - and _.
    """
    entries = read_entries(path) if path.exists() else []
    if not NAME.fullmatch(name) or name in {entry.name for entry in entries}:
        raise ValueError(f"token name {name!r} is not allowed: letters, digits, - and _, one that is not in use")
    if role not in ROLES:
        raise ValueError(f"role {role!r} is not allowed: one of {', '.join(ROLES)}")
    secret, salt = secrets.token_urlsafe(32), secrets.token_hex(16)
    entries.append(Entry(name, role, salt, _digest(salt, secret)))
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump([vars(entry) for entry in entries], file, indent=1)
    part.replace(path)
    return f"{name}.{secret}"


def given_token(header: str | None) -> str | None:
    """Return the token of an Authorization header, None if it holds no bearer token."""
    scheme, _, value = (header or "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else None


def _digest(salt: str, secret: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + secret.encode(errors="replace")).hexdigest()
