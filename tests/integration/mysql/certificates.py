"""An authority and certificates of it for servers of tests."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def make_certificates(folder: Path, *, host: str) -> dict[str, Path]:
    """
    `ca`, `cert` and `key` of a server that is called `host` (an IP address), and `other`: an authority that
    has not signed it.
    """
    folder.mkdir(mode=0o755)
    files = {name: folder / f"{name}.pem" for name in ("ca", "cert", "key", "other")}
    authority, key = _key(), _key()
    _write(files["ca"], _signed("authority", authority.public_key(), by=authority, authority=True))
    stranger = _key()
    _write(files["other"], _signed("stranger", stranger.public_key(), by=stranger, authority=True))
    _write(files["cert"], _signed("server", key.public_key(), by=authority, address=host))
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files["key"].write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    for path in files.values():
        path.chmod(0o644)
    return files


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _signed(
    name: str,
    key: ec.EllipticCurvePublicKey,
    *,
    by: ec.EllipticCurvePrivateKey,
    authority: bool = False,
    address: str = "",
) -> x509.Certificate:
    now = datetime.now(UTC)
    issuer = name if authority else "authority"
    made = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    if address:
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        made = made.add_extension(names, critical=False)
    return made.sign(by, hashes.SHA256())


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"cloudsave test {name}")])


def _write(path: Path, certificate: x509.Certificate) -> None:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
