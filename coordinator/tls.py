"""TLS for the coordinator's gRPC: a certificate whose key the link names, and channels that hold to it.

So no certificate authority is needed, and none can let another in: a volunteer trusts the holder of the one key that
the operator's link names, under whatever certificate: a renewed one of the same key leaves all links good.
"""

import asyncio
import ssl
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from averaging.private_file import write_private
from coordinator.link import MEND, Link
from training.errors import BadInput

YEARS = 20
NAME = "covey"
LONGEST_REPLY = 4 << 20  # bytes


@dataclass(frozen=True)
class Certificate:
    """PEM. `chain` begins with the coordinator's own certificate."""

    key: bytes
    chain: bytes

    @property
    def fingerprint(self) -> str:
        """As links have it."""
        return fingerprint(x509.load_pem_x509_certificate(self.chain))


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of its public key (as SubjectPublicKeyInfo), in 43 characters of base64url."""
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return urlsafe_b64encode(sha256(key).digest()).rstrip(b"=").decode()


def own_certificate(folder: Path) -> Certificate:
    """The self-signed one in `folder`, made on first use. Raises BadInput if what is there is none."""
    key_path, chain_path = folder / "tls.key", folder / "tls.crt"
    if not chain_path.exists():  # written last
        made = self_signed()
        write_private(key_path, made.key)
        write_private(chain_path, made.chain)
    return read_certificate(chain_path, key_path)


def read_certificate(chain_path: Path, key_path: Path) -> Certificate:
    """The operator's. Raises BadInput unless these are a certificate and its key, both PEM, with a name and good today:
    volunteers' gRPC holds to both."""
    try:
        found = Certificate(key_path.read_bytes(), chain_path.read_bytes())
        public = load_pem_private_key(found.key, password=None).public_key()
        certificate = x509.load_pem_x509_certificate(found.chain)
        if certificate.public_key() != public:
            raise ValueError("the key is another certificate's")
        if not certificate.not_valid_before_utc <= datetime.now(UTC) < certificate.not_valid_after_utc:
            raise ValueError(f"good from {certificate.not_valid_before_utc:%Y-%m-%d} to "
                             f"{certificate.not_valid_after_utc:%Y-%m-%d} only")
        _name(certificate)
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"certificate {chain_path} with key {key_path} ({error})", expected="a certificate and its "
                       "key, both PEM, without a password, good today", mend="Correct the paths, or renew it.") \
            from None
    return found


def self_signed() -> Certificate:
    """A new one."""
    key, now = generate_private_key(SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=365 * YEARS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(key, SHA256()))
    return Certificate(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
                       certificate.public_bytes(Encoding.PEM))


async def connect(link: Link, *, timeout_seconds: float, longest_reply: int = LONGEST_REPLY) -> grpc.aio.Channel:
    """A channel to the holder of the certificate that `link` names, and to nobody else; to be closed.

    `longest_reply`: bytes. Raises BadInput if nobody answers there, or somebody with another certificate.
    """
    try:
        pem = await asyncio.to_thread(ssl.get_server_certificate, (link.host, link.port), timeout=timeout_seconds)
    except ssl.SSLError as error:
        raise BadInput(f"no coordinator at {link.address} (no TLS: {error.reason or error})",
                       expected="a running `covey coordinator`", mend=MEND) from None
    except (OSError, UnicodeError) as error:  # the latter: a host that no name server could know
        raise unreachable(link, str(error) or "no answer in time") from None
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        found = fingerprint(certificate)
    except (ValueError, UnsupportedAlgorithm):  # of a stranger: OpenSSL takes what cryptography does not
        found = "unreadable"
    if found != link.certificate:
        raise BadInput(f"certificate {found[:12]}... at {link.address}",
                       expected=f"{link.certificate[:12]}..., as in the link", mend="Somebody else answers there, or "
                       "the coordinator was set up anew: ask the operator for a fresh link.")
    return grpc.aio.secure_channel(link.address, grpc.ssl_channel_credentials(pem.encode()), options=[
        ("grpc.ssl_target_name_override", _name(certificate)),
        ("grpc.default_authority", NAME), ("grpc.max_receive_message_length", longest_reply)])


class Unreachable(BadInput):
    """Nobody answers there: it may be away for a while."""


def unreachable(link: Link, details: str) -> Unreachable:
    """The error for that."""
    return Unreachable(f"no coordinator answers at {link.address} ({details})",
                       expected="a running `covey coordinator`",
                       mend="Check that it runs and that this machine reaches that port.")


def _name(certificate: x509.Certificate) -> str:
    """One that it is good for: it is trusted by its fingerprint, whatever it is called. ValueError: it has none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns = names.get_values_for_type(x509.DNSName)
        found = dns[0] if dns else str(names.get_values_for_type(x509.IPAddress)[0])
    except (x509.ExtensionNotFound, IndexError):
        common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        if not common:
            raise ValueError("it has no name") from None
        found = str(common[0].value)
    return found.replace("*", "any")
