"""A peer's identity: the RSA key behind its libp2p peer id, in a file, and what is signed by it. Imports no torch."""

from base64 import b64decode, b64encode
from hashlib import sha256
from pathlib import Path

from base58 import b58encode
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
    load_ssh_public_key,
)
from google.protobuf.message import DecodeError

from averaging.private_file import write_private
from proto.identity_pb2 import PrivateKey
from training.errors import BadInput

BITS = 2048
LONGEST_KEY = 1024    # bytes of a public key in OpenSSH's format; one of 4096 bits has 724
SHA2_256 = b"\x12\x20"  # multihash: this function, 32 bytes
PADDING = PSS(mgf=MGF1(SHA256()), salt_length=PSS.MAX_LENGTH)  # hivemind's


def open_key(path: Path) -> RSAPrivateKey:
    """The key in the file `path`, made on first use, readable by its owner only. Raises BadInput if it holds none."""
    if not path.exists():
        write_key(path, generate_private_key(public_exponent=65537, key_size=BITS))
    return read_key(path)


def read_key(path: Path) -> RSAPrivateKey:
    """The key in the file `path`, as libp2p keeps it. Raises BadInput if there is none."""
    try:
        return parse_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"identity file {path} ({error})", expected="a key that covey or libp2p wrote there",
                       mend="Bring it back from a copy, or remove it for a new identity.") from None


def parse_key(content: bytes) -> RSAPrivateKey:
    """The key in what such a file holds. ValueError if there is none, or one that is not RSA."""
    try:
        stored = PrivateKey.FromString(content)
        key = load_der_private_key(stored.data, password=None)
    except (TypeError, DecodeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise ValueError(str(error)) from None
    if stored.key_type or not isinstance(key, RSAPrivateKey):
        raise ValueError("not an RSA key")
    return key


def write_key(path: Path, key: RSAPrivateKey) -> None:
    """Put `key` into the file `path`, whole or not at all."""
    data = key.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    write_private(path, PrivateKey(key_type=0, data=data).SerializeToString())


def public_bytes(key: RSAPrivateKey) -> bytes:
    """The public key, in OpenSSH's format."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def sign(key: RSAPrivateKey, words: bytes) -> bytes:
    """RSA-PSS over SHA-256, base64: hivemind's form."""
    return b64encode(key.sign(words, PADDING, SHA256()))


def is_signed(public_key: bytes, words: bytes, signature: bytes) -> bool:
    """Whether the holder of `public_key` (OpenSSH's format) has signed `words`; False for keys that are none."""
    try:
        _public(public_key).verify(b64decode(signature), words, PADDING, SHA256())
    except (ValueError, InvalidSignature):
        return False
    return True


def peer_id_of(public_key: bytes) -> str:
    """The libp2p peer id that belongs to an RSA key in OpenSSH's format, whoever sent it. ValueError if it is none."""
    der = _public(public_key).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    libp2p = PrivateKey(key_type=0, data=der).SerializeToString()  # its PublicKey has the same two fields
    return b58encode(SHA2_256 + sha256(libp2p).digest()).decode()


def _public(public_key: bytes) -> RSAPublicKey:
    try:
        key = load_ssh_public_key(public_key if len(public_key) <= LONGEST_KEY else b"")
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, RSAPublicKey):
        raise ValueError("not an RSA key")
    return key
