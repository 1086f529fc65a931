"""What must not be shown is taken out, and what must not be stored is noticed. Pure."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

HIDDEN = "***"
_USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^\s:/?#@]*):(?P<secret>\S*)@")
_CONFIDENTIAL = (
    r"(?:ssl)?password|passwd|passphrase|pwd|secret\w*|token|sig|signature|sas|api_?key|[a-z_]*access_key"
)
_PARAMETER = re.compile(
    rf"(?P<name>\b(?:{_CONFIDENTIAL}))(?P<equals>\s*=\s*)(?:'(?:[^'\\]|\\.)*'|\"[^\"]*\"|[^\s&;,'\"]+)",
    re.IGNORECASE,
)
_RECOVERY_KEY = re.compile(r"AGE-SECRET-KEY-[A-Z0-9-]+", re.IGNORECASE)
_SECRET_NAME = re.compile(rf"(?:{_CONFIDENTIAL})", re.IGNORECASE)


def redact(text: str) -> str:
    """
    `text` with the passwords of URLs and connection strings, and recovery keys, replaced by stars.

    A password may hold any character but white space, so all up to the last "@" of the word is taken for it:
    rather too much than too little.
    """
    text = _USER_INFO.sub(rf"\g<scheme>\g<user>:{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\g<name>\g<equals>{HIDDEN}", text)
    return _RECOVERY_KEY.sub(HIDDEN, text)


def is_secret_name(name: str) -> bool:
    """Whether an option of this name would hold a secret: `password`, but not `password_file`."""
    return _SECRET_NAME.fullmatch(name) is not None


def holds_secret(url: str) -> bool:
    """Whether a URL or connection string has a password or a token in it."""
    try:
        parts = urlsplit(url)
        user_info, at, _ = parts.netloc.rpartition("@")
        secret_user = bool(at) and ":" in user_info and not user_info.endswith(":")
        secret_parameter = any(is_secret_name(key) for key, _ in parse_qsl(parts.query))
    except ValueError:
        return redact(url) != url
    return secret_user or secret_parameter or _split_password(url) or _PARAMETER.search(url) is not None


def _split_password(url: str) -> bool:
    """Whether a password with an unescaped "/", "?" or "#" hides behind what looks like a host and port."""
    match = _USER_INFO.match(url)
    return match is not None and re.match(r"\d*(?:[/?#]|$)", match["secret"]) is None
